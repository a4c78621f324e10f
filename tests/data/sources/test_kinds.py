"""Every kind of source gives the images that were packed, with their splits, classes and names."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from stages.data.sources import folders
from stages.data.sources.dispatch import read_source
from stages.runtime.command import StageError
from tests.packing import contents, image, kaggle_table, left_out, official, parquet, tar_bytes, write

PETS = {"train/cat/1.jpg": b"a", "train/dog/2.jpg": b"b", "train/dog/deep/3.jpg": b"c", "val/cat/4.jpg": b"d"}
POOL = {"cat/1.jpg": b"a", "dog/2.jpg": b"b", "dog/notes.txt": b"c"}


# ------------------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("top", ["", "./", "imagenette2/", "./imagenette2/"])
@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tgz", "w:gz"), ("a.tar.gz", "w:gz"), ("a.tar.bz2", "w:bz2")]
)
def test_archives_of_class_folders(tmp_path: Path, top: str, name: str, mode: str) -> None:
    write(tmp_path / name, tar_bytes({top + path: data for path, data in PETS.items()}, mode))
    assert contents(name, tmp_path) == PETS
    write(tmp_path / name, tar_bytes({top + path: data for path, data in POOL.items()}, mode))
    assert contents(name, tmp_path) == {f"all/{path}": data for path, data in POOL.items()}


def test_what_lies_in_no_class_folder_is_left_out(tmp_path: Path) -> None:
    others = {"set/noisy.csv": b"x", "set/train/README": b"x", "set/.DS_Store": b"x", "set/train/cat/._1.jpg": b"x"}
    write(tmp_path / "a.tgz", tar_bytes(others | {f"set/{path}": data for path, data in PETS.items()}, "w:gz"))
    assert contents("a.tgz", tmp_path) == PETS
    assert left_out("a.tgz", tmp_path) == {"file outside of the class folders": 2, "hidden file or folder": 2}


@pytest.mark.parametrize(
    ("stray", "match"),
    [
        ("set/extra/dog/9.jpg", "mixes split folders with others: train/, val/ are splits .* and extra/ not"),
        ("other/train/dog/9.jpg", "below other/ lie train/, which are splits"),
    ],
)
def test_an_archive_that_mixes_layouts_is_refused(tmp_path: Path, stray: str, match: str) -> None:
    write(tmp_path / "a.tar", tar_bytes({f"set/{path}": data for path, data in PETS.items()} | {stray: b"x"}))
    with pytest.raises(StageError, match=match):
        contents("a.tar", tmp_path)


def test_a_checksum_is_of_the_whole_file(tmp_path: Path) -> None:
    data = tar_bytes({f"set/{path}": data for path, data in PETS.items()}, "w:gz")
    write(tmp_path / "a.tgz", data)
    for algorithm in ("sha256", "md5"):
        right = hashlib.new(algorithm, data).hexdigest()
        assert contents(f"a.tgz?{algorithm}={right}", tmp_path) == PETS
        assert contents(f"a.tgz?{algorithm}={right.upper()}", tmp_path) == PETS
        write(tmp_path / "b.tgz", data + b"\0")
        with pytest.raises(StageError, match=f"its {algorithm} is .*, and the source says {right}"):
            contents(f"b.tgz?{algorithm}={right}", tmp_path)
        with pytest.raises(StageError, match="hex digits"):
            contents(f"a.tgz?{algorithm}=12", tmp_path)


def test_a_zip_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.tgz", b"PK\x03\x04 and so on")
    with pytest.raises(StageError, match=r"a\.tgz is none of \.tar"):
        contents("a.tgz", tmp_path)


# ------------------------------------------------------------------------------------- ImageNet, as it is downloaded


@pytest.mark.parametrize("devkit", [True, False])
def test_official_tars(tmp_path: Path, devkit: bool) -> None:
    packed = official(tmp_path / "in", devkit)
    source = read_source("in", tmp_path)
    assert contents(source) == packed
    assert [part.title for part in source.parts] == ["train/n01", "train/n02", "val"]
    assert list(contents("in?classes=n02", tmp_path)) == [path for path in packed if "/n02/" in path]


def test_official_tars_without_labels(tmp_path: Path) -> None:
    official(tmp_path / "in")
    (tmp_path / "in/ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(StageError, match=r"put ILSVRC2012_devkit_t12\.tar\.gz or LOC_val_solution\.csv beside it"):
        read_source("in", tmp_path)
    write(tmp_path / "in/LOC_val_solution.csv", kaggle_table({"ILSVRC2012_val_00000001.JPEG": "n01"}))
    with pytest.raises(StageError, match=r"val_00000002\.JPEG has no label"):
        contents("in", tmp_path)
    for damaged in (b"", tar_bytes({"data/meta.mat": b"x"}, "w:gz"), b"\x1f\x8bxxxxxxxxxxxxxxxxxx"):
        write(tmp_path / "in/ILSVRC2012_devkit_t12.tar.gz", damaged)
        with pytest.raises(StageError, match="devkit_t12"):
            read_source("in", tmp_path)


def unpacked(folder: Path) -> dict[str, bytes]:
    """Kaggle's archive, unpacked, without its table."""
    inside = {"train/n01/n01_1.JPEG": b"a", "train/n02/n02_1.JPEG": b"b", "val/v1.JPEG": b"c", "val/v2.JPEG": b"d"}
    for path, data in (inside | {"test/t1.JPEG": b"e"}).items():
        write(folder / "ILSVRC/Data/CLS-LOC" / path, data)
    return {
        "train/n01/n01_1.JPEG": b"a",
        "train/n02/n02_1.JPEG": b"b",
        "val/n01/v2.JPEG": b"d",
        "val/n02/v1.JPEG": b"c",
    }


@pytest.mark.parametrize("place", ["in", "in/ILSVRC"])
def test_kaggle(tmp_path: Path, place: str) -> None:
    packed = unpacked(tmp_path / "in")
    with pytest.raises(StageError, match=r"put LOC_val_solution\.csv"):
        read_source(place, tmp_path)
    write(tmp_path / "in/LOC_val_solution.csv", kaggle_table({"v1.JPEG": "n02", "v2.JPEG": "n01"}))
    assert contents(place, tmp_path) == packed
    assert left_out(place, tmp_path) == {"folder of images whose labels were never published": 1}
    write(tmp_path / "in/LOC_val_solution.csv", kaggle_table({"v1.JPEG": "n02", "v3.JPEG": "n01"}))
    with pytest.raises(StageError, match=r"names v3\.JPEG, but .* is not there"):
        read_source(place, tmp_path)
    write(tmp_path / "in/LOC_val_solution.csv", b"id,label\n1,2\n")
    with pytest.raises(StageError, match=r"expected the columns ImageId,PredictionString, found 'id,label'"):
        read_source(place, tmp_path)
    write(tmp_path / "in/LOC_val_solution.csv", kaggle_table({"v1.JPEG": "n02", "v2.JPEG": "n01"}))
    write(tmp_path / "in/imagenet_object_localization_patched2019.tar.gz", tar_bytes({"ILSVRC/x.JPEG": b"x"}, "w:gz"))
    assert contents(place, tmp_path) == packed


def test_a_folder_that_holds_one_archive_is_that_archive(tmp_path: Path) -> None:
    write(tmp_path / "in/a.tgz", tar_bytes({f"set/{path}": data for path, data in PETS.items()}, "w:gz"))
    assert contents("in", tmp_path) == PETS


# -------------------------------------------------------------------------------------------------------------- Parquet

NAMES = ["tench", "crane", "crane"]


def row(data: bytes, label: Any, path: str | None = "x.JPEG") -> dict[str, Any]:
    """A row as Hugging Face has it."""
    return {"image": image(data, path), "label": label}


@pytest.mark.parametrize("source", ["hf", "hf/data/*.parquet", "hf/data"])
def test_parquet(tmp_path: Path, source: str) -> None:
    data = tmp_path / "hf/data"
    write(tmp_path / "hf/README.md", b"x")
    parquet(data / "train-00000-of-00002.parquet", [row(bytes([n]), n % 3) for n in range(5)], NAMES)
    parquet(data / "train-00001-of-00002.parquet", [row(b"6", 0, None), row(b"7", -1), row(b"8", None)], NAMES)
    parquet(data / "validation-00000-of-00001.parquet", [row(b"9", 1, "a/b.png")], NAMES)
    parquet(data / "test-00000-of-00001.parquet", [row(b"t", -1)], NAMES)
    first = "train-00000-of-00002"
    assert contents(source, tmp_path) == {
        f"train/tench/{first}/000000-x.JPEG": b"\0",
        f"train/crane (1)/{first}/000001-x.JPEG": b"\1",
        f"train/crane (2)/{first}/000002-x.JPEG": b"\2",
        f"train/tench/{first}/000003-x.JPEG": b"\3",
        f"train/crane (1)/{first}/000004-x.JPEG": b"\4",
        "train/tench/train-00001-of-00002/000000": b"6",
        "train//train-00001-of-00002/000001-x.JPEG": b"7",
        "train//train-00001-of-00002/000002-x.JPEG": b"8",
        "val/crane (1)/validation-00000-of-00001/000000-b.png": b"9",
    }
    assert left_out(source, tmp_path) == {"shard of test whose labels were never published": 1}


def test_parquet_of_other_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "in/default/train/0000.parquet", [{"img": b"a", "kind": "cat"}, {"img": None, "kind": "dog"}])
    parquet(tmp_path / "in/default/test/0000.parquet", [{"img": b"b", "kind": "cat"}])
    assert contents("in?image=img&label=kind", tmp_path) == {
        "train/cat/train/0000/000000": b"a",
        "train/dog/train/0000/000001": b"",
        "test/cat/test/0000/000000": b"b",
    }
    assert set(contents("in?image=img", tmp_path)) == {
        "train//train/0000/000000",
        "train//train/0000/000001",
        "test//test/0000/000000",
    }
    with pytest.raises(
        StageError, match=r"no column 'image' \(it has: img \(binary\), kind \(string\)\).*may be in: img"
    ):
        read_source("in", tmp_path)
    with pytest.raises(StageError, match="no column 'label'"):
        read_source("in?image=img&label=label", tmp_path)
    with pytest.raises(StageError, match="the column 'kind' is string; expected bytes"):
        read_source("in?image=kind", tmp_path)


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [row(b"a", 3)], NAMES)
    with pytest.raises(StageError, match=r"a\.parquet, row 0: the label 3 is none of the 3 class names"):
        contents("a.parquet", tmp_path)
    parquet(tmp_path / "a.parquet", [{"image": image(None, "far/away.jpg"), "label": 0}, row(b"b", 0)], NAMES)
    with pytest.raises(StageError, match=r"row 0 names a file, 'far/away\.jpg', and does not hold it"):
        contents("a.parquet", tmp_path)
    whole = parquet(tmp_path / "a.parquet", [row(bytes(1000), 0)] * 9, NAMES).read_bytes()
    for damaged in (b"", b"x" * 100, whole[:500], whole[:-1], whole[: len(whole) // 2] + whole[-300:]):
        write(tmp_path / "a.parquet", damaged)
        with pytest.raises(StageError, match="no Parquet file, or a damaged one"):
            contents("a.parquet", tmp_path)
    parquet(tmp_path / "in/train-0.parquet", [row(b"a", 0)])
    parquet(tmp_path / "in/more-0.parquet", [row(b"a", 0)])
    with pytest.raises(StageError, match="the name of more-0 tells no split"):
        read_source("in", tmp_path)


# ----------------------------------------------------------------------------------------------------------- webdataset


@pytest.mark.parametrize("source", ["wds", "wds/*.tar", "wds/pets-{train,val}-00000{0..1}.tar"])
def test_webdataset(tmp_path: Path, source: str) -> None:
    write(tmp_path / "names.txt", b"cat\ndog\n")
    shards = {
        "pets-train-000000": {"a/1.cls": b"1", "a/1.jpg": b"one", "2.JPG": b"two", "2.cls": b" 0\n", "2.seg.png": b"x"},
        "pets-train-000001": {"1.png": b"one", "1.json": json.dumps({"label": 1}).encode(), "9.cls": b"1"},
        "pets-val-000000": {"1.webp": b"v", "1.txt": b"bird", "1.x.cls": b"0"},
        "pets-val-000001": {"1.jpg": b"w", "2.jpg": b"x", "2.cls": b"-1"},
    }
    for name, members in shards.items():
        write(tmp_path / f"wds/{name}.tar", tar_bytes(members))
    assert contents(f"{source}?class_names=names.txt", tmp_path) == {
        "train/dog/pets-train-000000/a/1.jpg": b"one",
        "train/cat/pets-train-000000/2.jpg": b"two",
        "train/dog/pets-train-000001/1.png": b"one",
        "val/bird/pets-val-000000/1.webp": b"v",
        "val//pets-val-000001/1.jpg": b"w",
        "val//pets-val-000001/2.jpg": b"x",
    }
    assert {path.split("/")[1] for path in contents(source, tmp_path)} == {"1", "0", "bird", ""}


def test_webdataset_that_cannot_be_used(tmp_path: Path) -> None:
    def refused(match: str, **members: bytes) -> None:
        write(tmp_path / "a.tar", tar_bytes({name.replace("_", "."): data for name, data in members.items()}))
        write(tmp_path / "names.txt", b"cat\ndog\n")
        with pytest.raises(StageError, match=match):
            contents("a.tar?class_names=names.txt", tmp_path)

    refused("2 is none of the 2 class names", a_jpg=b"x", a_cls=b"2")
    refused("second image of its sample", a_jpg=b"x", a_png=b"x")
    refused("is no label", a_jpg=b"x", a_json=b"[1]")
    refused("is no label", a_jpg=b"x", a_cls=b"\xff")
    refused("a is in it twice", a_jpg=b"x", b_jpg=b"x", a_cls=b"1")
    with pytest.raises(StageError, match=r"looked for the file .*b-1\.tar"):
        read_source("b-{1..2}.tar", tmp_path)
    with pytest.raises(StageError, match="without `}`"):
        read_source("b-{1..2.tar", tmp_path)


# -------------------------------------------------------------------------------------------------- unlabelled, subsets


def test_a_flat_folder_is_unlabelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PIECE", 2)
    packed = {f"{n}.jpg": bytes([n]) for n in range(5)}
    for name, data in packed.items():
        write(tmp_path / "in" / name, data)
    source = read_source("in", tmp_path)
    assert contents(source) == {f"all//{name}": data for name, data in packed.items()}
    assert [part.whole_class for part in source.parts] == [None] * 3


def test_labels_can_be_forgotten(tmp_path: Path) -> None:
    write(tmp_path / "a.tgz", tar_bytes({f"set/{path}": data for path, data in PETS.items()}, "w:gz"))
    expected = {path.replace("/", "//", 1): data for path, data in PETS.items()}
    assert contents("a.tgz?unlabelled=true", tmp_path) == expected
    write(tmp_path / "b.tar", tar_bytes({"1.jpg": b"a", "1.txt": b"a long / caption\n" * 99}))
    assert contents("b.tar?unlabelled=true", tmp_path) == {"all//b/1.jpg": b"a"}
    with pytest.raises(StageError, match="must be true, false or skip, got 'yes'"):
        read_source("b.tar?unlabelled=yes", tmp_path)


def test_images_without_a_label_can_be_left_out(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [row(b"a", 0), row(b"b", None), row(b"c", -1)], NAMES)
    assert list(contents("a.parquet?unlabelled=skip", tmp_path)) == ["all/tench/a/000000-x.JPEG"]
    assert list(contents("a.parquet?unlabelled=skip&images_per_class=1", tmp_path)) == ["all/tench/a/000000-x.JPEG"]
    write(tmp_path / "b.tar", tar_bytes({"1.jpg": b"a", "2.jpg": b"b", "2.cls": b"7"}))
    assert contents("b.tar?unlabelled=skip", tmp_path) == {"all/7/b/2.jpg": b"b"}


def test_a_very_large_class_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PIECE", 3)
    packed = {f"cat/{n}.jpg": bytes([n]) for n in range(7)} | {"dog/1.jpg": b"d"}
    for path, data in packed.items():
        write(tmp_path / "in" / path, data)
    source = read_source("in", tmp_path)
    assert contents(source) == {f"all/{path}": data for path, data in packed.items()}
    assert [part.whole_class for part in source.parts] == [None, None, None, ("all", "dog")]


def every_kind(folder: Path) -> dict[str, dict[str, list[int]]]:
    """URI of sources that hold the same in four ways: three classes of nine images, of which the number is the byte."""
    classes = {name: [9 * place + n for n in range(9)] for place, name in enumerate(("ant", "bee", "cow"))}
    files = [(name, number) for name, numbers in classes.items() for number in numbers]
    for name, number in files:
        write(folder / f"folder/{name}/{number}.jpg", bytes([number]))
    write(
        folder / "archive.tgz", tar_bytes({f"{name}/{number}.jpg": bytes([number]) for name, number in files}, "w:gz")
    )
    samples = [{f"{number}.jpg": bytes([number]), f"{number}.cls": name.encode()} for name, number in files]
    write(folder / "wds.tar", tar_bytes([member for sample in samples for member in sample.items()]))
    parquet(folder / "hf.parquet", [{"image": bytes([number]), "label": name} for name, number in files])
    return dict.fromkeys(("folder", "archive.tgz", "wds.tar", "hf.parquet"), classes)


def test_subsets_of_every_kind(tmp_path: Path) -> None:
    def classes(source: str) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for path, data in contents(source, tmp_path).items():
            found.setdefault(path.split("/")[1], set()).add(data[0])
        return found

    write(tmp_path / "list.txt", b"cow\n\nbee\n")
    chosen = []
    for source, whole in every_kind(tmp_path).items():
        assert classes(source) == {name: set(numbers) for name, numbers in whole.items()}
        assert classes(f"{source}?classes=bee").keys() == {"bee"}
        assert classes(f"{source}?classes=@list.txt").keys() == {"bee", "cow"}
        chosen.append(frozenset(classes(f"{source}?num_classes=2&seed=3")))
        assert chosen[-1] == chosen[0]
        assert len(chosen[-1]) == 2
        few, more = (classes(f"{source}?images_per_class={n}&seed=1") for n in (3, 5))
        assert [len(numbers) for numbers in few.values()] == [3, 3, 3]
        assert all(few[name] < more[name] < set(whole[name]) for name in whole)
        both = classes(f"{source}?images_per_class=2&num_classes=1&classes=ant,bee")
        assert len(both) == 1 and both.keys() < {"ant", "bee"} and len(next(iter(both.values()))) == 2
        with pytest.raises(StageError, match="unknown colour after the `\\?`"):
            read_source(f"{source}?colour=red", tmp_path)


def test_the_listing_is_the_same_until_the_source_changes(tmp_path: Path) -> None:
    for source in every_kind(tmp_path):
        query = f"{source}?classes=ant,bee,cow&images_per_class=3"
        before = read_source(query, tmp_path).listing
        assert read_source(query, tmp_path).listing == before
        assert read_source(f"{query}&seed=1", tmp_path).listing != before
        changed = tmp_path / source if (tmp_path / source).is_file() else tmp_path / source / "ant/1.jpg"
        changed.write_bytes(changed.read_bytes())
        assert read_source(query, tmp_path).listing != before
