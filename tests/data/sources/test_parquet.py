"""Parquet as people write it: the column of labels by its name, metadata or not at all; labels of every type."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data.sources.dispatch import read_source
from stages.data.sources.parts import Image, Name
from stages.runtime.command import StageError
from tests.packing import contents, image, noted

CLASSES = {"names": ["cat", "dog"], "_type": "ClassLabel"}
IMAGES = {"_type": "Image"}


def shard(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> str:
    """A file of these columns, beside one of images, with what Hugging Face's `datasets` keeps of them."""
    rows = max(map(len, columns.values()), default=1)
    if not {"image", "img", "jpg"} & columns.keys():
        columns = {"image": [image(bytes([n + 1])) for n in range(rows)]} | columns
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return str(path)


def classes(source: str) -> list[str]:
    """The class of each row."""
    return [path.split("/")[1] for path in contents(source)]


# ---------------------------------------------------------------------------------------------------- which column


@pytest.mark.parametrize("name", ["labels", "fine_label", "target", "class", "Label", "a.b"])
def test_the_only_column_with_class_names_is_that_of_labels(tmp_path: Path, name: str) -> None:
    source = shard(tmp_path / "a.parquet", {name: [1, 0], "width": [3, 4]}, {"image": IMAGES, name: CLASSES})
    assert classes(source) == ["dog", "cat"]
    assert read_source(source, "").notes == (
        f"labels are read from the column `{name}`, the only one with class names",
    )


def test_a_column_of_class_names_inside_a_struct(tmp_path: Path) -> None:
    columns = {"meta": [{"class": 1, "id": 7}, {"class": 0, "id": 8}, None]}
    source = shard(tmp_path / "a.parquet", columns, {"image": IMAGES, "meta": {"class": CLASSES}})
    assert classes(source) == ["dog", "cat", ""]
    assert classes(f"{source}?label=meta.id") == ["7", "8", ""]
    with pytest.raises(StageError, match=r"no column 'meta\.x'"):
        contents(f"{source}?label=meta.x")


@pytest.mark.parametrize("names", [("fine_label", "coarse_label"), ("label", "class")])
def test_two_columns_of_labels_ask(tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = names
    features = {"image": IMAGES, second: CLASSES} | ({first: CLASSES} if first != "label" else {})
    source = shard(tmp_path / "a.parquet", {first: [1], second: [0]}, features)
    with pytest.raises(StageError, match=r"may be in .*; choose one: \?label=") as error:
        contents(source)
    assert first in str(error.value) and second in str(error.value)
    assert classes(f"{source}?label={second}") == ["cat"]
    assert contents(f"{source}?unlabelled=true")


@pytest.mark.parametrize("name", ["labels", "target", "category"])
def test_no_column_of_labels_lists_the_columns(tmp_path: Path, name: str) -> None:
    source = shard(tmp_path / "a.parquet", {name: [1, 0], "__index_level_0__": [0, 1]})
    assert classes(source) == ["", ""]
    (note,) = read_source(source, "").notes
    assert f"all images are unlabelled (it has: image (struct), {name} (int64)); ?label=COLUMN names one" in note
    assert classes(f"{source}?label={name}") == ["1", "0"]
    assert read_source(f"{source}?unlabelled=true", "").notes == ()


def test_shards_that_differ_in_their_labels_stop(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.parquet", {"label": [1]}, {"label": CLASSES})
    shard(tmp_path / "train-1.parquet", {"id": [1]})
    with pytest.raises(StageError, match="train-0 and train-1 differ in their column of labels"):
        read_source(str(tmp_path), "")
    assert len(contents(f"{tmp_path}?unlabelled=true")) == 2
    shard(tmp_path / "train-1.parquet", {"label": [1]})
    with pytest.raises(StageError, match="differ in their kind of labels, numbers or names"):
        read_source(str(tmp_path), "")
    (tmp_path / "train-0.parquet").rename(tmp_path / "test-0.parquet")
    with pytest.raises(StageError, match="differ in their kind of labels, numbers or names"):
        read_source(str(tmp_path), "")
    shard(tmp_path / "train-1.parquet", {"label": ["cat"]})
    assert classes(str(tmp_path)) == ["dog", "cat"]


def test_groups_of_a_column(tmp_path: Path) -> None:
    columns = {"label": [1, 0, 1], "patient": [7.0, None, 8.0], "meta": [{"id": b"a"}, None, {"id": b"b"}]}
    source = shard(tmp_path / "a.parquet", columns)
    for column, groups in {"patient": ["7", "", "8"], "meta.id": ["a", "", "b"], "label": ["1", "0", "1"]}.items():
        (part,) = read_source(f"{source}?group=column:{column}", "").parts
        for items in (part.names(), part.images()):
            assert [item.group for item in items if isinstance(item, (Name, Image))] == groups
    with pytest.raises(StageError, match=r"no column 'x' \(it has: .*&group=column:COLUMN"):
        read_source(f"{source}?group=column:x", "")
    with pytest.raises(StageError, match="its group is an object with 'id'"):
        contents(f"{source}?group=column:meta")


# ------------------------------------------------------------------------------------------------- types of labels


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([1.0, None, float("nan"), -1.0, 0.0], pa.float64()),
        ([1.0, None, float("nan"), -1.0, 0.0], pa.float32()),
        ([1, None, None, -1, 0], pa.int8()),
        ([1, None, None, None, 0], pa.uint64()),
        ([Decimal("1.00"), None, None, Decimal(-1), Decimal(0)], pa.decimal128(5, 2)),
        (["1", None, "", None, "0"], pa.large_string()),
        (["1", None, "", None, "0"], pa.dictionary(pa.int8(), pa.string())),
        ([b"1", None, b"", None, b"0"], pa.binary()),
    ],
)
def test_labels_with_gaps(tmp_path: Path, labels: list[Any], kind: pa.DataType) -> None:
    source = shard(tmp_path / "a.parquet", {"label": pa.array(labels, kind)})
    assert classes(source) == ["1", "", "", "", "0"]
    assert sum(count for what, count in noted(source).items() if what.startswith("unlabelled")) == 3
    if not (pa.types.is_large_string(kind) or pa.types.is_dictionary(kind) or pa.types.is_binary(kind)):
        named = shard(tmp_path / "b.parquet", {"label": pa.array(labels, kind)}, {"label": CLASSES})
        assert classes(named) == ["dog", "", "", "", "cat"]


def test_true_and_false(tmp_path: Path) -> None:
    assert classes(shard(tmp_path / "a.parquet", {"label": [True, False, None]})) == ["true", "false", ""]
    assert classes(shard(tmp_path / "a.parquet", {"label": [True, False]}, {"label": CLASSES})) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([[0, 1]], r"'label' is list<.*several classes for an image.*\?label=COLUMN"),
        ([{"id": 1}], "'label' is struct<id: int64>"),
        (pa.array([0], pa.timestamp("s")), "'label' is timestamp"),
        ([0.5], r"row 0: the label 0\.5 is no whole number"),
        ([float("inf")], "inf is no whole number"),
        ([b"\xff"], "no text in UTF-8"),
    ],
)
def test_labels_that_are_refused(tmp_path: Path, labels: Any, match: str) -> None:
    source = shard(tmp_path / "a.parquet", {"label": labels})
    with pytest.raises(StageError, match=match):
        contents(source)
    assert contents(f"{source}?unlabelled=true")


def test_names_in_a_column_that_has_a_list_of_names(tmp_path: Path) -> None:
    assert classes(shard(tmp_path / "a.parquet", {"label": ["dog", "cat"]}, {"label": CLASSES})) == ["dog", "cat"]
    for odd in ("bird", "1"):
        with pytest.raises(StageError, match=f"row 0: the label '{odd}' is none of the class names"):
            contents(shard(tmp_path / "a.parquet", {"label": [odd]}, {"label": CLASSES}))


def test_class_names_that_no_folder_can_have(tmp_path: Path) -> None:
    names = ["T - shirt / top", "T - shirt _ top", ".hidden", "a\\b"]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    source = read_source(shard(tmp_path / "a.parquet", {"label": [0, 1, 2, 3]}, features), "")
    names_found = [item for part in source.parts for item in part.names() if isinstance(item, Name)]
    found = [(item.class_name, item.title) for item in names_found]
    assert len({name for name, _ in found}) == 4
    assert [title for _, title in found] == ["T - shirt / top", "", ".hidden", "a\\b"]
    as_text = shard(tmp_path / "b.parquet", {"label": names})
    assert classes(as_text) == [name for name, _ in found]


# ---------------------------------------------------------------------------------------------------------- images


def test_the_only_column_that_is_called_an_image(tmp_path: Path) -> None:
    source = shard(tmp_path / "a.parquet", {"img": [image(b"x")], "label": [1]}, {"img": IMAGES, "label": CLASSES})
    assert classes(source) == ["dog"]
    assert "images are read from the column `img`" in read_source(source, "").notes[0]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3), pa.dictionary(pa.int32(), pa.binary())])
def test_images_without_a_struct(tmp_path: Path, kind: pa.DataType) -> None:
    source = shard(tmp_path / "a.parquet", {"jpg": pa.array([b"one", b"two"], kind), "label": [1, 0]})
    with pytest.raises(StageError, match=r"no column 'image'.*\?image=COLUMN.*Images may be in: jpg"):
        read_source(source, "")
    assert list(contents(f"{source}?image=jpg").values()) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("cells", "match"),
    [
        ([{"path": "a.jpg"}], "names files and does not hold them.*embed_table_storage"),
        ([image(None, "a.jpg")], "row 0 names a file, 'a.jpg', and does not hold it"),
        ([[image(b"x")]], r"several images in a row.*one a row"),
        (["a.jpg"], "is string; expected bytes"),
        ([[0, 1, 2]], "is list<.*expected bytes"),
    ],
)
def test_images_that_are_refused(tmp_path: Path, cells: list[Any], match: str) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if cells == [image(None, "a.jpg")] else None
    with pytest.raises(StageError, match=match):
        contents(shard(tmp_path / "a.parquet", {"image": pa.array(cells, kind), "label": [0]}))
