"""Sources: every layout gives the same groups of files, whatever else lies about."""

import os
from pathlib import Path

import pytest

from stages.data.sources.dispatch import Source, read_source
from stages.data.sources.parts import Image, LeftOut, Name
from stages.runtime.command import StageError


def put(folder: Path, *names: str) -> None:
    """Files whose content is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")


def listed(source: Source) -> dict[str, list[str]]:
    """`split/class` with the names of its files that are taken."""
    found: dict[str, list[str]] = {}
    for part in source.parts:
        for name in part.names():
            if isinstance(name, Name) and source.choice.takes(name):
                found.setdefault(f"{name.split}/{name.class_name}", []).append(name.name)
    return found


def test_split_folders(tmp_path: Path) -> None:
    put(
        tmp_path,
        "pets/val/dog/3.jpg",
        "pets/train/dog/2.jpg",
        "pets/train/dog/10.jpg",
        "pets/train/cat/1.jpg",
        "pets/x.md",
    )
    assert listed(read_source("pets", tmp_path)) == {
        "train/cat": ["1.jpg"],
        "train/dog": ["10.jpg", "2.jpg"],
        "val/dog": ["3.jpg"],
    }


def test_one_level_of_classes(tmp_path: Path) -> None:
    put(tmp_path, "pets/cat/1.jpg", "pets/dog/notes.txt", "pets/.git/x", "pets/cat/.DS_Store", "pets/cat/deep/2.jpg")
    source = read_source("pets", tmp_path)
    assert listed(source) == {"all/cat": ["1.jpg", "deep/2.jpg"]}
    assert source.left_out[0] == LeftOut("dog/notes.txt", "file in a folder without an image")
    images = (each for each in source.parts[0].images() if isinstance(each, Image))
    assert [image.data.read() for image in images] == [b"pets/cat/1.jpg", b"pets/cat/deep/2.jpg"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, "vehicles/train/1.jpg", "vehicles/bus/2.jpg")
    assert listed(read_source("vehicles", tmp_path)) == {"all/bus": ["2.jpg"], "all/train": ["1.jpg"]}


def test_split_folders_beside_others_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "pets/train/dog/1.jpg", "pets/extra/dog/2.jpg")
    with pytest.raises(StageError, match="extra"):
        read_source("pets", tmp_path)


def test_tiny_imagenet(tmp_path: Path) -> None:
    put(tmp_path, "tiny/wnids.txt", "tiny/train/n01/images/n01_0.JPEG", "tiny/train/n01/n01_boxes.txt")
    put(tmp_path, "tiny/train/n02/images/n02_0.JPEG", "tiny/val/images/val_1.JPEG", "tiny/val/images/val_0.JPEG")
    (tmp_path / "tiny/val/val_annotations.txt").write_text(
        "val_1.JPEG\tn02\t0\t0\t9\t9\nval_0.JPEG\tn02\t0\t0\t9\t9\n", encoding="utf-8"
    )
    assert listed(read_source("tiny", tmp_path)) == {
        "train/n01": ["n01_0.JPEG"],
        "train/n02": ["n02_0.JPEG"],
        "val/n02": ["val_0.JPEG", "val_1.JPEG"],
    }


def test_subsets(tmp_path: Path) -> None:
    put(tmp_path, *(f"pets/{name}/{number}.jpg" for name in ("ant", "bee", "cat") for number in range(9)))
    assert listed(read_source("pets?classes=bee", tmp_path)).keys() == {"all/bee"}
    assert len(listed(read_source("pets?num_classes=2&seed=3", tmp_path))) == 2
    few, more = (listed(read_source(f"pets?images_per_class={n}", tmp_path)) for n in (3, 5))
    assert all(len(files) == 3 for files in few.values())
    assert all(set(few[name]) < set(more[name]) for name in few)
    assert few != listed(read_source("pets?images_per_class=3&seed=1", tmp_path))
    with pytest.raises(StageError, match="no class dog"):
        read_source("pets?classes=dog", tmp_path)


def test_links_are_followed_and_hidden_folders_are_not(tmp_path: Path) -> None:
    put(tmp_path, "store/1.jpg", "pets/cat/2.jpg", "pets/cat/.ipynb_checkpoints/2.jpg")
    (tmp_path / "pets/cat/more").symlink_to(tmp_path / "store")
    assert listed(read_source("pets", tmp_path)) == {"all/cat": ["2.jpg", "more/1.jpg"]}
    (tmp_path / "store/back").symlink_to(tmp_path / "pets/cat")
    with pytest.raises(StageError, match="link"):
        read_source("pets", tmp_path)


def test_what_cannot_be_read_or_named_is_said(tmp_path: Path) -> None:
    put(tmp_path, "pets/cat/1.jpg")
    (tmp_path / "pets/cat/gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StageError, match=r"gone\.jpg cannot be read"):
        read_source("pets", tmp_path)
    (tmp_path / "pets/cat/gone.jpg").unlink()
    os.mkfifo(tmp_path / "pets/cat/pipe.jpg")
    with pytest.raises(StageError, match=r"pipe\.jpg is no plain file"):
        read_source("pets", tmp_path)
    (tmp_path / "pets/cat/pipe.jpg").unlink()
    Path(os.fsdecode(bytes(tmp_path / "pets/cat") + b"/caf\xe9.jpg")).touch()
    with pytest.raises(StageError, match=r"caf\\xe9\.jpg.*not UTF-8"):
        read_source("pets", tmp_path)
    for name in (b"caf\xe9", b"a\nb"):
        (tmp_path / "birds" / os.fsdecode(name)).mkdir(parents=True)
        with pytest.raises(StageError, match="rename the folder"):
            read_source("birds", tmp_path)
        (tmp_path / "birds" / os.fsdecode(name)).rmdir()


def test_a_class_of_tiny_imagenet_without_images(tmp_path: Path) -> None:
    put(tmp_path, "tiny/wnids.txt", "tiny/train/n01/n01_boxes.txt", "tiny/val/val_annotations.txt")
    (tmp_path / "tiny/train/n01/images").mkdir()
    with pytest.raises(StageError, match="line 1"):
        read_source("tiny", tmp_path)
    (tmp_path / "tiny/val/val_annotations.txt").write_text("", encoding="utf-8")
    with pytest.raises(StageError, match="train/n01 has no file"):
        read_source("tiny", tmp_path)


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    put(tmp_path, "pets/cat/1.jpg")
    assert listed(read_source(str(tmp_path / "pets"), Path("elsewhere"))) == {"all/cat": ["1.jpg"]}
