"""Parquet shards as Hugging Face writes them: a row an image, with the image's bytes and its label."""

import io
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.sources.labels import MISSING, Label, apart, class_label, group_name, label_of, nested
from stages.data.sources.locations import Location, check_name, check_size, first_line, unreadable
from stages.data.sources.memory import available_memory
from stages.data.sources.parquet_pages import memory_to_read
from stages.data.sources.parts import Image, LeftOut, Listed, Name, Noted, ShardPart, splits_of, stamp_of
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)
ROWS = 16
"""Rows that are in memory at a time."""
READ_AHEAD = 2**20
"""Bytes of a column that are read at a time; without it a whole row group is."""
MEMORY = 2**28
"""Bytes. Files whose pages need more are read one at a time."""
_one_large = threading.Lock()


class Columns(NamedTuple):
    """Which columns are read: those that the source's query names, or that the file's schema tells."""

    image: str | None = None
    """Of images; None: `image`, or the only one that Hugging Face's metadata calls an image."""
    label: str | None = None
    """Of labels, `meta.class` in a struct; None: `label`, or the only one with class names in the metadata."""
    unlabelled: bool = False
    """Nobody asks for labels."""
    group: str | None = None
    """Of the groups of images; None: there are none."""


@dataclass(frozen=True)
class ParquetShard(ShardPart):
    """Rows become `<shard>/<row>-<file name>`, as rows may have the same file name."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None
    memory: int = 0
    """Bytes that reading it needs, where its pages are large."""
    has_numbers: bool = False
    """Labels are numbers that have no names."""
    group: str | None = None

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """A row after the other; a row without an image becomes a file of no bytes, for validation to name it.

        Raises:
            StageError: the shard is damaged, or its rows name files that lie elsewhere.
        """
        with _one_large if self.memory > MEMORY else nullcontext():
            for number, (cell, value, group) in enumerate(self._rows(self.image)):
                data, path = self._bytes(cell, number)
                check_size(self._row(number), len(data))
                name, label, group = self._name(number, path), self._label(value, number), self._group(group, number)
                if label.noted:
                    yield Noted(name, label.noted)
                yield Image(self.split, label.class_name, name, len(data), io.BytesIO(data), label.title, group)

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        """The same without the bytes, which are not read."""
        for number, (cell, value, group) in enumerate(self._rows(f"{self.image}.path")):
            path = cell.get("path") if isinstance(cell, dict) else None
            name, label = self._name(number, path), self._label(value, number)
            if label.noted:
                yield Noted(name, label.noted)
            yield Name(self.split, label.class_name, name, label.title, self._group(group, number))

    def _rows(self, column: str) -> Iterator[tuple[Any, Any, Any]]:
        """Cell of the image, label and group of each row; a few rows are in memory."""
        with parquet_file(self.location) as file:
            columns = [column, *filter(None, (self.label, self.group))]
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                found = dict(zip(batch.schema.names, batch.columns, strict=True))
                cells = [_cells(found, path, batch.num_rows) for path in (self.image, self.label, self.group)]
                yield from zip(*cells, strict=True)

    def _bytes(self, cell: Any, number: int) -> tuple[bytes, str | None]:
        if not isinstance(cell, dict):
            return cell or b"", None
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and path:
            raise StageError(f"{self._row(number)} names a file, {path[:200]!r}, and does not hold it; {EMBED}")
        return data or b"", path

    def _name(self, number: int, path: str | None) -> str:
        base = (path or "").replace("\\", "/").rpartition("/")[2]
        check_name(f"{self._row(number)}: {base}", base)
        return f"{self.below}/{number:06d}" + (f"-{base}" if base else "")

    def _label(self, value: Any, number: int) -> Label:
        if self.label is None:
            return Label("")
        if isinstance(value, bool):
            value = str(value).lower() if self.class_names is None else int(value)
        if isinstance(value, str) and value and self.class_names is not None:
            if value not in self.class_names:
                raise StageError(f"{self._row(number)}: the label {value[:60]!r} is none of the class names")
            return class_label(value, self._row(number))
        return label_of(value, self.class_names, self._row(number), "?label=COLUMN names another column")

    def _group(self, value: Any, number: int) -> str:
        return group_name(value, self._row(number))

    def _row(self, number: int) -> str:
        return f"{self.location}, row {number}"


EMBED = (
    "write the dataset again with its images embedded (datasets: `from datasets.table import embed_table_storage`, "
    "`dataset.with_format('arrow').map(embed_table_storage, batched=True)`)"
)


def _cells(found: dict[str, pa.Array], path: str | None, rows: int) -> list[Any]:
    """The values of a column, which may lie in structs; null where there is none."""
    if path is None:
        return [None] * rows
    if path in found:
        return cast(list[Any], found[path].to_pylist())
    top = path.partition(".")[0]
    if top not in found:
        return [None] * rows
    values = (nested({top: cell}, path) for cell in found[top].to_pylist())
    return [None if value is MISSING else value for value in values]


@contextmanager
def parquet_file(location: Location) -> Iterator[pq.ParquetFile]:
    """pyarrow's reader of a shard; whatever it finds wrong becomes one message.

    Raises:
        StageError: the shard is damaged.
    """
    with location.open(random_access=True) as file:
        try:
            source = pa.PythonFile(cast(Any, file), mode="r") if not location.is_local else file
            yield pq.ParquetFile(source, buffer_size=READ_AHEAD, pre_buffer=False, memory_map=False)
        except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(str(location), error) from error
            what = f"no Parquet file, or a damaged one ({first_line(error)})"
            raise StageError(f"{location} is {what}; bring it whole") from error


def parquet_shards(shards: dict[str, Location], where: str, columns: Columns) -> Listed:
    """Shards by their path below what they have in common, each a part.

    Args:
        shards: path, without the suffix -> the shard.
        where: for messages.
        columns: which are read.

    Raises:
        StageError: a column is missing or of another type, some names tell a split and others do not, some shards have
            labels and others not, or a page needs more memory than there is.
    """
    splits = splits_of(shards, where)
    parts, notes = [], dict[str, None]()
    for below, shard in sorted(shards.items()):
        part, said = _part(shard, splits[below], below, columns)
        parts.append(part)
        notes |= dict.fromkeys(said)
    if large := [part.memory for part in parts if part.memory > MEMORY]:
        say = (
            f"{len(large)} files hold hundreds of images in a page: up to {max(large) / 1e9:.1f} GB of memory for one, "
            f"one after the other (small row groups would take far less)"
        )
        logger.warning("source %s: %s", where, say)
        notes[say] = None
    test = [part for part in parts if part.split == "test"]
    others = [part for part in parts if part.split != "test"]
    if not columns.unlabelled:
        _check_alike(parts, where)
        if test and any(part.label for part in others) and not any(map(_has_labels, test)):
            left_out = [LeftOut(part.below, "shard of test whose labels were never published") for part in test]
            return Listed("Parquet shards", list(others), tuple(notes), tuple(left_out))
    return Listed("Parquet shards", list(parts), tuple(notes))


def _has_labels(part: ParquetShard) -> bool:
    return any(isinstance(name, Name) and name.class_name for name in part.names())


def _check_alike(parts: list[ParquetShard], where: str) -> None:
    """Refuses shards of which one has labels and another none, or numbers without names: both cannot be meant."""
    with_labels = [part for part in parts if part.label]
    for part in parts if with_labels else ():
        first = with_labels[0]
        if part.label is None and part.split == "test":  # never published
            continue
        if part.label != first.label or part.has_numbers != first.has_numbers:
            what = "kind of labels, numbers or names" if part.label == first.label else "column of labels"
            raise StageError(
                f"source {where}: {first.below} and {part.below} differ in their {what}; name the shards that belong "
                f"together with `*`, and the column with ?label=COLUMN"
            )


def _part(location: Location, split: str, below: str, columns: Columns) -> tuple[ParquetShard, list[str]]:
    """The part, and what is to be said of it."""
    with parquet_file(location) as file:
        schema = file.schema_arrow
        features = _features(schema)
        image, notes = _image_column(location, schema, features, columns)
        label, more = _label_column(location, schema, features, columns)
        class_names = _class_names(features, label)
        if columns.unlabelled and columns.label is None and not _is_plain(_type_at(schema, label)):
            label, class_names = None, None  # nobody asks for it, and what it may hold must stop nobody
        _check_image(location, schema, image)
        if label is not None and not _is_label(kind := _type_at(schema, label)):
            several = ": several classes for an image, of which Synset takes one" if _is_list(kind) else ""
            raise StageError(
                f"{location}: the column {label!r} is {kind}{several}; expected numbers of classes, or their names "
                f"({_listed(schema)}); ?label=COLUMN names another"
            )
        memory = _memory(location, image)
        has_numbers = class_names is None and _is_number(_type_at(schema, label))
    stamp = stamp_of([location.entry()])
    part = ParquetShard(location, split, below, stamp, image, label, class_names, memory, has_numbers, columns.group)
    return part, notes + more


def _image_column(
    location: Location, schema: pa.Schema, features: dict[str, Any], columns: Columns
) -> tuple[str, list[str]]:
    """The column of images, and what was guessed."""
    if (image := columns.image or "image") in schema.names:
        return image, []
    found = [name for name in schema.names if columns.image is None and _kind(features.get(name)) == "Image"]
    if len(found) == 1:
        return found[0], [
            f"images are read from the column `{found[0]}`, the only one that the metadata calls an image"
        ]
    likely = [name for name in schema.names if _is_image(schema.field(name).type)]
    raise StageError(
        f"{location} has no column {image!r} ({_listed(schema)}); name the right ones: ?image=COLUMN&label=COLUMN"
        + (f". Images may be in: {', '.join(likely)[:200]}" if likely else "")
    )


def _label_column(
    location: Location, schema: pa.Schema, features: dict[str, Any], columns: Columns
) -> tuple[str | None, list[str]]:
    """The column of labels, and what was guessed; None where nothing tells it.

    Raises:
        StageError: the one that is asked for is not there, or several may be meant.
    """
    for name in filter(None, (columns.label, columns.group)):
        if _type_at(schema, name) is None:
            raise StageError(
                f"{location} has no column {name!r} ({_listed(schema)}); "
                f"name the right ones: ?image=COLUMN&label=COLUMN&group=column:COLUMN"
            )
    if columns.label is not None:
        return columns.label, []
    named = [path for path in _class_labels(features) if _type_at(schema, path) is not None]
    has_label = "label" in schema.names
    if columns.unlabelled or (has_label and (not named or "label" in named)):
        return ("label" if has_label else None), []
    if len(named) == 1 and not has_label:
        return named[0], [f"labels are read from the column `{named[0]}`, the only one with class names"]
    if named:
        found = [*named, *(["label"] if has_label else [])]
        raise StageError(
            f"{location}: the labels may be in {', '.join(found)[:300]}; choose one: ?label={found[0]}, "
            f"or ?unlabelled=true for none"
        )
    return None, [
        f"no column is taken for labels, so all images are unlabelled ({_listed(schema)}); ?label=COLUMN names one"
    ]


def _listed(schema: pa.Schema) -> str:
    """The columns for people, without those that pandas adds."""
    shown = [f"{each.name} ({_short(each.type)})" for each in schema if not each.name.startswith("__")]
    return f"it has: {', '.join(shown)[:500]}"


def _short(kind: pa.DataType) -> str:
    return "struct" if pa.types.is_struct(kind) else "list" if _is_list(kind) else str(kind)


def _type_at(schema: pa.Schema, path: str | None) -> pa.DataType | None:
    """The type of a column, or of a field in a struct at `column.field`; None where there is none."""
    if path is None:
        return None
    if path in schema.names:
        return schema.field(path).type
    top, *rest = path.split(".")
    kind = schema.field(top).type if top in schema.names and rest else pa.null()
    for name in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind if rest else None


def _is_list(kind: pa.DataType | None) -> bool:
    return kind is not None and (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return _is_bytes(kind)


def _is_label(kind: pa.DataType | None) -> bool:
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    tests = (
        _is_number,
        pa.types.is_boolean,
        pa.types.is_null,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        _is_bytes,
    )
    return kind is not None and any(test(kind) for test in tests)


def _is_plain(kind: pa.DataType | None) -> bool:
    return kind is not None and (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    )


def _is_number(kind: pa.DataType | None) -> bool:
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return kind is not None and any(test(kind) for test in tests)


def _check_image(location: Location, schema: pa.Schema, image: str) -> None:
    kind = schema.field(image).type
    if _is_image(kind):
        return
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        raise StageError(f"{location}: the column {image!r} names files and does not hold them; {EMBED}")
    several = " (several images in a row)" if _is_list(kind) and _is_image(kind.value_type) else ""
    raise StageError(
        f"{location}: the column {image!r} is {kind}{several}; expected bytes, or a struct with bytes and "
        f"path: encoded images, one a row ({_listed(schema)}); ?image=COLUMN names another"
    )


def _memory(location: Location, image: str) -> int:
    """Bytes that reading the images takes.

    Raises:
        StageError: there is not as much.
    """
    with location.open(random_access=True) as file:
        memory = memory_to_read(file, image)
    if memory > MEMORY:
        available = available_memory()
        say = f"{location} keeps hundreds of images in one page: reading it takes up to {memory / 1e9:.1f} GB of memory"
        if memory > available:
            raise StageError(
                f"{say}, and {available / 1e9:.1f} GB are free. Write it again with small row groups: "
                f"`pyarrow.parquet.write_table(table, path, row_group_size=100)`, or `to_parquet(path, "
                f"row_group_size=100)` of pandas"
            )
    return memory


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's `datasets` keeps of the columns beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(feature: Any) -> str:
    return str(feature.get("_type")) if isinstance(feature, dict) else ""


def _class_labels(features: dict[str, Any], above: str = "") -> list[str]:
    """The columns that hold numbers of named classes; with a dot where they lie in a struct."""
    found = []
    for name, feature in features.items():
        if _kind(feature) == "ClassLabel":
            found.append(above + name)
        elif isinstance(feature, dict) and not above and "_type" not in feature:
            found += _class_labels(feature, f"{name}.")
    return found


def _class_names(features: dict[str, Any], label: str | None) -> tuple[str, ...] | None:
    """The names of the classes that the numbers of a column stand for."""
    feature = nested(features, label or "")
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return apart(names)
