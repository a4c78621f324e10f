"""Samples as people write them: labels of odd kinds, images and labels in named fields."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.data.sources.dispatch import read_source
from stages.data.sources.parts import Name
from stages.runtime.command import StageError
from tests.packing import contents, left_out, noted, tar_bytes, write


def shard(folder: Path, members: dict[str, Any]) -> str:
    """A shard; what is not bytes is written as JSON."""
    as_bytes = {name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in members.items()}
    write(folder / "a.tar", tar_bytes(as_bytes))
    return str(folder / "a.tar")


def classes(source: str) -> list[str]:
    """The class of each image, in the order of the shard."""
    return [path.split("/")[1] for path in contents(source)]


def test_null_and_whole_floats_in_json(tmp_path: Path) -> None:
    values = [None, 1.0, 0, -1, float("nan"), ""]
    source = shard(tmp_path, {f"{n}.{kind}": b"x" if kind == "jpg" else {"label": value}
                              for n, value in enumerate(values) for kind in ("jpg", "json")})  # fmt: skip
    assert classes(source) == ["", "1", "0", "", "", ""]
    assert noted(source) == {
        "label is a whole number with a decimal point": 1,
        "unlabelled: its label is -1": 1,
        "unlabelled: its label is empty": 1,
        "unlabelled: its label is null": 2,
    }
    assert classes(shard(tmp_path, {"1.jpg": b"x", "1.json": b"null", "2.jpg": b"x", "2.json": {"id": 1}})) == ["", ""]
    assert "unlabelled: no `label` in its .json (fields: id; ?label=FIELD names one)" in noted(source)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([0, 1], "000001.json: the label is a list of 2, 0, 1"),
        ({"id": 1, "name": "cat"}, r"an object with 'id', 'name'.*\?label=label\.id"),
        ({}, "an object with nothing"),
        (True, "bool True"),
        (0.5, "0.5 is no whole number"),
        ("0, 1", "more than one"),
    ],
)
def test_what_is_no_class_stops_with_the_sample(tmp_path: Path, value: Any, match: str) -> None:
    source = shard(tmp_path, {"000001.jpg": b"x", "000001.json": {"label": value}})
    with pytest.raises(StageError, match=match) as error:
        contents(source)
    assert "?label=" in str(error.value)
    assert contents(f"{source}?unlabelled=true")


@pytest.mark.parametrize("value", [[{"label": 1}], "cat", 3, True])
def test_json_that_is_no_object(tmp_path: Path, value: Any) -> None:
    with pytest.raises(StageError, match=r"1\.json is no label: it is no object with `label`"):
        contents(shard(tmp_path, {"1.jpg": b"x", "1.json": value}))


def test_another_field_of_the_json(tmp_path: Path) -> None:
    meta = {"class": "cat", "meta": {"id": 4, "all": [4]}, "a.b": "dog"}
    source = shard(tmp_path, {"1.jpg": b"x", "1.cls": b"7", "1.json": meta, "1.species.txt": b"lynx"})
    assert classes(source) == ["7"]
    for field, found in {"class": "cat", "meta.id": "4", "a.b": "dog", "species.txt": "lynx", "x.y": ""}.items():
        assert classes(f"{source}?label={field}") == [found]
    with pytest.raises(StageError, match="a list of 1, 4"):
        contents(f"{source}?label=meta.all")
    source = shard(tmp_path, {"1.jpg": b"x", "1.target": b"7", "2.jpg": b"y", "2.target.json": b"3"})
    with pytest.raises(StageError, match=r"2\.target\.json is no label: it is no object with `label`"):
        contents(source)
    assert classes(f"{source}?label=target") == ["7", "3"]
    assert classes(f"{source}?label=target.json") == ["", "3"]


def test_numbers_and_names_in_one_shard_stop(tmp_path: Path) -> None:
    members = {"1.jpg": b"x", "1.json": {"label": 1.0}, "2.jpg": b"x", "2.json": {"label": "cat"}}
    with pytest.raises(StageError, match="the label of 1 is a number, and that of 2 a name"):
        contents(shard(tmp_path, members))
    write(tmp_path / "names.txt", b"ant\ncat\n")
    assert classes(f"{shard(tmp_path, members)}?class_names={tmp_path}/names.txt") == ["cat", "cat"]


def test_names_of_numbers_that_come_twice_stay_two_classes(tmp_path: Path) -> None:
    write(tmp_path / "names.txt", b"crane\ncrane\n")
    source = shard(tmp_path, {"1.jpg": b"x", "1.cls": b"0", "2.jpg": b"y", "2.cls": b"1"})
    assert classes(f"{source}?class_names={tmp_path}/names.txt") == ["crane (0)", "crane (1)"]


@pytest.mark.parametrize("name", ["image.jpg", "Image.JPG", "left.cam0.png", "jpg", "5 m.webp"])
def test_an_image_in_a_named_field(tmp_path: Path, name: str) -> None:
    source = shard(tmp_path, {f"000001.{name}": b"x", "000001.cls": b"1", "000002.cls": b"0", "000002.npy": b"y"})
    assert contents(source) == {f"all/1/a/000001.{name.lower()}": b"x"}
    assert left_out(source) == {"sample without an image": 1}


def test_more_than_one_image_asks_which(tmp_path: Path) -> None:
    source = shard(tmp_path, {"1.left.png": b"l", "1.right.png": b"r", "1.cls": b"1", "2.cls": b"1"})
    with pytest.raises(StageError, match=r"the sample 1 has 2 images \(left\.png, .*\?image=left\."):
        contents(source)
    for wanted in ("left", "left.png", "LEFT"):
        assert contents(f"{source}?image={wanted}") == {"all/1/a/1.left.png": b"l"}
    assert left_out(f"{source}?image=right") == {"further image of a sample": 1, "sample without the image `right`": 1}
    source = shard(tmp_path, {"1.jpg": b"j", "1.png": b"p", "1.cls": b"1"})
    with pytest.raises(StageError, match=r"1\.png is the second image of its sample.*\?image=FIELD"):
        contents(source)
    assert contents(f"{source}?image=png") == {"all/1/a/1.png": b"p"}
    for order in (("jpg", "mask.png"), ("mask.png", "jpg")):
        source = shard(tmp_path, {f"1.{name}": name.encode() for name in order})
        assert contents(source) == {"all//a/1.jpg": b"jpg"}
        assert left_out(source) == {"further image of a sample": 1}


def test_dots_in_names_are_explained(tmp_path: Path) -> None:
    with pytest.raises(
        StageError, match="up to the first dot are one sample: if these are samples of their own, rename"
    ):
        contents(shard(tmp_path, {"photo.2021.01.jpg": b"x", "photo.2021.02.jpg": b"y"}))
    with pytest.raises(StageError, match=r"more than 16 labels.*up to the first dot"):
        contents(shard(tmp_path, {f"photo.{n}.{kind}": b"1" for n in range(20) for kind in ("jpg", "cls")}))


def test_a_label_in_a_named_field(tmp_path: Path) -> None:
    assert classes(shard(tmp_path, {"1.image.jpg": b"x", "1.label.cls": b"4"})) == ["4"]
    assert classes(shard(tmp_path, {"1.image.jpg": b"x", "1.meta.json": {"label": "cat"}})) == ["cat"]
    source = shard(tmp_path, {"1.jpg": b"x", "1.caption.txt": b"a cat"})
    assert classes(source) == [""]
    assert noted(source) == {"unlabelled: no .cls, .json or .txt (files: jpg, caption.txt; ?label=FIELD names one)": 1}
    source = shard(tmp_path, {"1.jpg": b"x", "1.fine.cls": b"4", "1.coarse.cls": b"1"})
    with pytest.raises(StageError, match=r"the labels fine\.cls, coarse\.cls; choose one: \?label=fine\.cls"):
        contents(source)
    assert classes(f"{source}?label=coarse.cls") == ["1"]


def test_groups_of_a_field(tmp_path: Path) -> None:
    meta = [{"label": 1, "patient": {"id": 7.0}}, {"label": 0, "patient": {"id": "p8"}}, {"patient": {"id": None}}, {}]
    source = shard(tmp_path, {f"{n}.{kind}": b"x" if kind == "jpg" else value
                              for n, value in enumerate(meta) for kind in ("jpg", "json")})  # fmt: skip
    for query in ("?group=field:patient.id", "?group=field:patient.id&unlabelled=true"):
        read = read_source(source + query, "")
        found = [item for part in read.parts for item in part.names() if isinstance(item, Name)]
        assert [item.group for item in found] == ["7", "p8", "", ""]
        assert [item.class_name for item in found] == (["1", "0", "", ""] if "&" not in query else [""] * 4)
    with pytest.raises(StageError, match="0: its group is an object with 'id'"):
        contents(f"{source}?group=field:patient")
    with pytest.raises(StageError, match="a column is of a Parquet source"):
        read_source(f"{source}?group=column:patient", "")
