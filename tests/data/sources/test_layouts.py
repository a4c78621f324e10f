"""Layouts: folders, tars and zips that people bring are read the same, or refused with what to do; none in silence."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from stages.data.sources.account import Seen
from stages.data.sources.dispatch import Source, read_source
from stages.data.sources.fitness import check_fitness
from stages.data.sources.parts import Name, is_split_word, split_in, splits_of
from stages.runtime.command import StageError
from tests.packing import kaggle_table, left_out, write

FORMS = ("in", "in.tgz", "in.tar", "in.zip")


def bring(folder: Path, *names: str) -> None:
    """A source as a folder, as tars with a folder around all, and as a zip; `name*3` stands for three images."""
    files: dict[str, bytes] = {}
    for name in names:
        path, _, count = name.partition("*")
        files |= {f"{path}/{n}.jpg": b"x" for n in range(int(count))} if count else {path: b"x"}
    for path, data in files.items():
        write(folder / "in" / path, data)
    for name, mode in (("in.tgz", "w:gz"), ("in.tar", "w")):
        with tarfile.open(folder / name, mode) as tar:  # type: ignore[call-overload]
            for path, data in files.items():
                info = tarfile.TarInfo(f"top/{path}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with zipfile.ZipFile(folder / "in.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path, data in files.items():
            packed.writestr(path, data)


def counts(source: Source) -> dict[str, int]:
    """`split/class` -> images."""
    found: dict[str, int] = {}
    for part in source.parts:
        for name in part.names():
            if isinstance(name, Name) and source.choice.takes(name):
                found[f"{name.split}/{name.class_name}"] = found.get(f"{name.split}/{name.class_name}", 0) + 1
    return dict(sorted(found.items()))


def pets(*splits: str, count: int = 2) -> list[str]:
    """Class folders of two classes in each split."""
    return [f"{split}/{name}*{count}" for split in splits for name in ("cat", "dog")]


def check_all(folder: Path, expected: dict[str, int], query: str = "") -> None:
    """Every form of the source is read as expected."""
    for form in FORMS:
        assert counts(read_source(form + query, folder)) == expected, form


def check_refused(folder: Path, match: str, query: str = "") -> None:
    """Every form of the source is refused."""
    for form in FORMS:
        with pytest.raises(StageError, match=match) as refused:
            read_source(form + query, folder)
        assert str(refused.value).isprintable()


# --------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Validation", "Testing"),
        ("TRAIN", "VAL", "TEST"),
        ("train_set", "valid", "test_set"),
        ("training-images", "dev", "testImages"),
        ("train2017", "val2017", "test2017"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val", "imagenet-test"),
        ("seg_train/seg_train", "eval", "seg_test/seg_test"),
        ("trn", "development_set", "holdout"),
    ],
)
def test_split_folders_by_any_usual_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    splits = ("train", "val", "test")
    bring(tmp_path, *pets(*names))
    check_all(tmp_path, {f"{split}/{name}": 2 for split in sorted(splits) for name in ("cat", "dog")})
    if names[0] == "Training":
        assert "Training/ is read as the split train" in read_source("in", tmp_path).notes


@pytest.mark.parametrize(
    "names",
    [("train", "bus"), ("test", "control"), ("valid", "invalid"), ("bullet-train", "steam-train"), ("dev", "ops")],
)
def test_a_class_may_be_named_like_a_split(tmp_path: Path, names: tuple[str, str]) -> None:
    bring(tmp_path, *(f"{name}*2" for name in names))
    check_all(tmp_path, {f"all/{name}": 2 for name in sorted(names)})
    note = f"{names[0]}/ is read as a class"
    if is_split_word(names[0]) and names[0] != "dev":
        assert any(each.startswith(note) for each in read_source("in", tmp_path).notes)


@pytest.mark.parametrize(
    ("folders", "match", "query", "found"),
    [
        (pets("train", "val", "valid"), "2 folders for one split: val/ and valid/ both mean val", "leave_out=valid", 4),
        (pets("train", "Test", "testing"), "2 folders for one split", "leave_out=testing", 4),
        (pets("train", "extra"), "mixes split folders with others: train/ .* extra/ not", "leave_out=extra", 2),
        (pets("seg_train", "seg_test", "pred"), "and pred/ not", "leave_out=pred", 4),
        (["train*2", "bus*2", "test*2"], "or, if all are classes, \\?splits=false", "splits=false", 3),
        (pets("test"), "no `train` among them", "", 0),
        ([*pets("train"), "test/Cat*2", "test/Dog*2"], "test .* has no class of train", "leave_out=test", 2),
    ],
)
def test_splits_that_can_be_read_in_two_ways_stop(
    tmp_path: Path, folders: list[str], match: str, query: str, found: int
) -> None:
    bring(tmp_path, *folders)
    check_refused(tmp_path, match)
    for form in FORMS if query else ():
        assert len(counts(read_source(f"{form}?{query}", tmp_path))) == found


def test_what_was_left_out_is_counted(tmp_path: Path) -> None:
    bring(tmp_path, *pets("train", "extra"), "notes/a.txt", "readme.txt")
    for form in FORMS:
        assert left_out(f"{form}?leave_out=extra", tmp_path) == {
            "left out as `leave_out` asks": 4,
            "file in a folder without an image": 1,
            "file outside of the class folders": 1,
        }
    check_refused(tmp_path, "`leave_out` names nothing", "?leave_out=extra,nothing")


def test_names_of_shards_tell_splits() -> None:
    assert splits_of(["a-train-0", "a-dev-0"], "x") == {"a-train-0": "train", "a-dev-0": "val"}
    assert splits_of(["nuclei-dev"], "x") == {"nuclei-dev": "all"}
    assert splits_of(["imagenet-val-000003"], "x") == {"imagenet-val-000003": "val"}
    assert split_in("train-val") is None


# ------------------------------------------------------------------------------------------------ splits without labels


@pytest.mark.parametrize("split", ["val", "test", "Validation/images", "val/images"])
def test_a_flat_split_stops_until_someone_decides(tmp_path: Path, split: str) -> None:
    bring(tmp_path, *pets("train"), f"{split}*3")
    check_refused(tmp_path, f"{split}/ holds 3 images and no class folders")
    top = split.partition("/")[0]
    check_all(tmp_path, {"train/cat": 2, "train/dog": 2}, f"?leave_out={top}")
    for form in FORMS:
        assert left_out(f"{form}?leave_out={top}", tmp_path) == {"left out as `leave_out` asks": 3}
    assert sum(counts(read_source("in?unlabelled=true", tmp_path)).values()) == 7
    check_all(tmp_path, {"train/cat": 2, "train/dog": 2}, "?unlabelled=skip")


TABLES = {
    "val_labels.csv": b"file,label\n0.jpg,cat\n1.jpg,dog\n2.jpg,cat\n",
    "val.txt": b"val/0.jpg cat\nval/1.jpg dog\nval/2.jpg cat\n",
    "val/val_annotations.txt": b"0.jpg\tcat\t0\t0\n1.jpg\tdog\t0\t0\n2.jpg\tcat\t1\t1\n",
    "labels.tsv": b"id\tclass\n0\tcat\n1\tdog\n2\tcat\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_flat_split_is_labelled_by_a_table_beside_it(tmp_path: Path, table: str) -> None:
    bring(tmp_path, *pets("train"), "val*3")
    write(tmp_path / "in" / table, TABLES[table])
    source = read_source("in", tmp_path)
    assert counts(source) == {"train/cat": 2, "train/dog": 2, "val/cat": 2, "val/dog": 1}
    assert any("its labels are from" in note for note in source.notes)


def test_a_table_of_imagenet_and_of_others(tmp_path: Path) -> None:
    bring(tmp_path, *pets("train"), "val/a.JPEG", "val/b.JPEG", "val/c.JPEG")
    write(tmp_path / "in/LOC_val_solution.csv", kaggle_table({"a.JPEG": "cat", "b.JPEG": "cow"}))
    assert counts(read_source("in", tmp_path))["val/cat"] == 1
    assert {
        "image that the table of labels does not name",
        "image whose label in the table is no class of train",
    } <= set(left_out("in", tmp_path))
    (tmp_path / "in/LOC_val_solution.csv").unlink()
    write(tmp_path / "in/val.txt", b"a.JPEG 3\nb.JPEG 5\nc.JPEG 3\n")
    with pytest.raises(StageError, match=r"val\.txt beside it names other files or other classes"):
        read_source("in", tmp_path)


def test_splits_without_any_class_are_unlabelled(tmp_path: Path) -> None:
    bring(tmp_path, "train*2", "test*2")
    check_all(tmp_path, {"test/": 2, "train/": 2})


# ------------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("top", ["PetImages", "a/b/c", "data/images"])
def test_folders_around_the_classes(tmp_path: Path, top: str) -> None:
    others = ["preview.jpg", "README.md", "__MACOSX/x/cat/1.jpg", ".DS_Store", "labels/1.txt"]
    bring(tmp_path, *pets(top), *others, f"{top}/preview.jpg")
    check_all(tmp_path, {"all/cat": 2, "all/dog": 2})
    for form in FORMS:
        assert left_out(form, tmp_path) == {
            "image above the class folders": 2,
            "file outside of the class folders": 1,
            "put there by an operating system": 1,
            "hidden file or folder": 1,
            "file in a folder without an image": 1,
        }


def test_one_image_above_split_folders_decides_nothing(tmp_path: Path) -> None:
    bring(tmp_path, "a_preview.jpg", *pets("train", "val"))
    check_all(tmp_path, {"train/cat": 2, "train/dog": 2, "val/cat": 2, "val/dog": 2})


def test_more_images_above_the_classes_than_in_them_stop(tmp_path: Path) -> None:
    bring(tmp_path, "x/cat*2", "x/dog*2", *(f"x/{n}.jpg" for n in range(9)))
    check_refused(tmp_path, "9 images lie above the class folders")


def test_nested_classes_stop_and_show_both_readings(tmp_path: Path) -> None:
    bring(tmp_path, "animals/cat*2", "animals/dog*2", "cars/vw*2", "cars/cat*2")
    for form, level in zip(FORMS, (1, 2, 2, 1), strict=True):
        with pytest.raises(
            StageError, match=rf"animals, cars.*class_level={level}\. .*cat, dog.*class_level={level + 1}"
        ):
            read_source(form, tmp_path)
        assert counts(read_source(f"{form}?class_level={level}", tmp_path)) == {"all/animals": 4, "all/cars": 4}
        inner = read_source(f"{form}?class_level={level + 1}", tmp_path)
        assert counts(inner) == {"all/cat": 4, "all/dog": 2, "all/vw": 2}
        names = [name.name for part in inner.parts for name in part.names() if isinstance(name, Name)]
        assert "animals/cat/0.jpg" in {name.removeprefix("top/") for name in names}


@pytest.mark.parametrize("parts", ["part{}", "part{}/images"])
def test_several_folders_around_classes_stop(tmp_path: Path, parts: str) -> None:
    bring(tmp_path, *pets(parts.format(1), parts.format(2)))
    check_refused(tmp_path, "can be read in two ways")
    level = 2 + parts.count("/")
    assert counts(read_source(f"in?class_level={level}", tmp_path)) == {"all/cat": 4, "all/dog": 4}


@pytest.mark.parametrize("folders", [("cat/train*2", "cat/test*2", "dog/train*2"), ("a/train/cat*2", "b/train/cat*2")])
def test_splits_below_other_folders_stop(tmp_path: Path, folders: tuple[str, ...]) -> None:
    bring(tmp_path, *folders)
    check_refused(tmp_path, "which are splits by their names, below class folders")


def test_folders_in_class_folders(tmp_path: Path) -> None:
    bring(tmp_path, "cat/images*2", "dog/images*2")
    check_all(tmp_path, {"all/cat": 2, "all/dog": 2})
    bring(tmp_path / "b", "cat*3", "cat/more*2", "dog/dog*2")
    check_all(tmp_path / "b", {"all/cat": 5, "all/dog": 2})


def test_several_archives_are_splits_by_their_names(tmp_path: Path) -> None:
    for split in ("Train", "Testing"):
        bring(tmp_path / split, *pets("x"))
        for suffix in ("zip", "tgz"):
            write(tmp_path / suffix / f"{split}.{suffix}", (tmp_path / split / f"in.{suffix}").read_bytes())
    for suffix in ("zip", "tgz", "zip/*.zip"):
        assert set(counts(read_source(suffix, tmp_path))) == {"train/cat", "train/dog", "test/cat", "test/dog"}


def test_several_archives_of_one_pool(tmp_path: Path) -> None:
    for part in ("a", "b"):
        bring(tmp_path / part, *pets("x"))
        write(tmp_path / f"parts/{part}.zip", (tmp_path / part / "in.zip").read_bytes())
    assert counts(read_source("parts", tmp_path)) == {"all/cat": 4, "all/dog": 4}
    write(tmp_path / "parts/cat.zip", zip_of("1.jpg"))
    with pytest.raises(StageError, match="cat is one of 3 archives, and its images lie in no class folder"):
        read_source("parts", tmp_path)
    write(tmp_path / "wds.zip", zip_of("1.jpg", "1.cls"))
    with pytest.raises(StageError, match="a zip of webdataset samples"):
        read_source("wds.zip", tmp_path)


def zip_of(*names: str) -> bytes:
    """A zip of small files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name in names:
            packed.writestr(name, b"x")
    return buffer.getvalue()


def test_the_first_batch_to_fine_tune_on_has_two_classes(tmp_path: Path) -> None:
    bring(tmp_path, "PetImages/cat*2", "PetImages/cat/more*2")
    source, seen = read_source("in", tmp_path), Seen()
    for item in (item for part in source.parts for item in part.names()):
        seen.see(item, taken=True)
    with pytest.raises(StageError, match=r"read as one class, cat, .*In it lie more/"):
        check_fitness(source, seen, "finetune")
    check_fitness(source, seen, "finetune", is_first=False)
    check_fitness(source, seen, "pretrain")


def test_an_archive_beside_folders_of_images_does_not_replace_them(tmp_path: Path) -> None:
    bring(tmp_path, *pets("train", "test"), "annotations.tar.gz", "meta.parquet")
    assert len(counts(read_source("in", tmp_path))) == 4
    assert left_out("in", tmp_path) == {"file outside of the class folders": 2}


def test_a_folder_without_any_image_is_refused_when_it_is_listed(tmp_path: Path) -> None:
    """So that a flow refuses such a delivery, and goes on with the others."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/_READY").touch()
    with pytest.raises(StageError, match="holds no class folder"):
        read_source("empty", tmp_path)
