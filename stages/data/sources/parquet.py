"""Parquet shards as Hugging Face writes them: a row an image, with the image's bytes and its label."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.sources.locations import Location, check_name, check_size, first_line, unreadable
from stages.data.sources.parts import (
    Image,
    LeftOut,
    Listed,
    Name,
    Noted,
    ShardPart,
    check_class,
    splits_of,
    stamp_of,
)
from stages.runtime.command import StageError

ROWS = 16
"""Rows that are in memory at a time."""
READ_AHEAD = 2**20
"""Bytes of a column that are read at a time; without it a whole row group is."""


@dataclass(frozen=True)
class ParquetShard(ShardPart):
    """Rows become `<shard>/<row>-<file name>`, as rows may have the same file name."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """A row after the other; a row without an image becomes a file of no bytes, for validation to name it.

        Raises:
            StageError: the shard is damaged, or its rows name files that lie elsewhere.
        """
        number = 0
        for batch in self._batches(self.image):
            for cell, label in zip(batch[0], batch[1], strict=True):
                data, path = self._bytes(cell, number)
                check_size(self._row(number), len(data))
                name = self._name(number, path)
                yield Image(self.split, self._class_name(label, number), name, len(data), io.BytesIO(data))
                number += 1

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        """The same without the bytes, which are not read."""
        number = 0
        for batch in self._batches(f"{self.image}.path"):
            for cell, label in zip(batch[0], batch[1], strict=True):
                path = cell.get("path") if isinstance(cell, dict) else None
                yield Name(self.split, self._class_name(label, number), self._name(number, path))
                number += 1

    def _batches(self, column: str) -> Iterator[tuple[list[Any], list[Any]]]:
        """Cells of the images and their labels, a few rows at a time."""
        with parquet_file(self.location) as file:
            columns = [column] + ([self.label] if self.label else [])
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                found = dict(zip(batch.schema.names, batch.columns, strict=True))
                rows = batch.num_rows
                images = found[self.image].to_pylist() if self.image in found else [None] * rows
                yield images, found[self.label].to_pylist() if self.label else [None] * rows

    def _bytes(self, cell: Any, number: int) -> tuple[bytes, str | None]:
        if not isinstance(cell, dict):
            return cell or b"", None
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and path:
            raise StageError(
                f"{self._row(number)} names a file, {path[:200]!r}, and does not hold it; "
                f"write the dataset again with its images embedded"
            )
        return data or b"", path

    def _name(self, number: int, path: str | None) -> str:
        base = (path or "").replace("\\", "/").rpartition("/")[2]
        check_name(f"{self._row(number)}: {base}", base)
        return f"{self.below}/{number:06d}" + (f"-{base}" if base else "")

    def _class_name(self, label: Any, number: int) -> str:
        if label is None or label == -1:
            return ""
        if self.class_names is None:
            return check_class(str(label), self._row(number))
        if not isinstance(label, int) or not 0 <= label < len(self.class_names):
            raise StageError(f"{self._row(number)}: the label {label!r} is none of {len(self.class_names)} classes")
        return check_class(self.class_names[label], self._row(number))

    def _row(self, number: int) -> str:
        return f"{self.location}, row {number}"


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


def parquet_shards(
    shards: dict[str, Location], where: str, image: str | None, label: str | None, unlabelled: bool = False
) -> Listed:
    """Shards by their path below what they have in common, each a part.

    Args:
        shards: path, without the suffix -> the shard.
        where: for messages.
        image: name of the column of images; None: `image`.
        label: name of the column of labels; None: `label`, where there is one.
        unlabelled: nobody asks for labels, so a test split without is as good as the others.

    Raises:
        StageError: a column is missing or of another type, or some names tell a split and others do not.
    """
    splits = splits_of(shards, where)
    parts = [_part(shard, splits[below], below, image or "image", label) for below, shard in sorted(shards.items())]
    test = [part for part in parts if part.split == "test"]
    others = [part for part in parts if part.split != "test"]
    if test and not unlabelled and any(part.label for part in others) and not any(map(_has_labels, test)):
        left_out = [LeftOut(part.below, "shard of test whose labels were never published") for part in test]
        return Listed("Parquet shards", list(others), left_out=tuple(left_out))
    return Listed("Parquet shards", list(parts))


def _has_labels(part: ParquetShard) -> bool:
    return any(isinstance(name, Name) and name.class_name for name in part.names())


def _part(location: Location, split: str, below: str, image: str, label: str | None) -> ParquetShard:
    with parquet_file(location) as file:
        schema = file.schema_arrow
        for name in [image, *([label] if label else [])]:
            if name not in schema.names:
                raise StageError(
                    f"{location} has no column {name!r} (it has: {', '.join(schema.names)[:500]}); "
                    f"name the right ones: ?image=COLUMN&label=COLUMN"
                )
        label = label or ("label" if "label" in schema.names else None)
        _check_types(location, schema, image, label)
        names = _class_names(schema.metadata or {}, label)
    return ParquetShard(location, split, below, stamp_of([location.entry()]), image, label, names)


def _check_types(location: Location, schema: pa.Schema, image: str, label: str | None) -> None:
    kind = schema.field(image).type
    held = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(held) or pa.types.is_large_binary(held)):
        raise StageError(f"{location}: the column {image!r} is {kind}; expected bytes, or a struct with bytes and path")
    if label is not None:
        kind = schema.field(label).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise StageError(f"{location}: the column {label!r} is {kind}; expected numbers of classes, or their names")


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...] | None:
    """The names that Hugging Face's `datasets` keeps beside the schema; a name that several classes have gets numbers.

    ImageNet has two cranes, a bird and a machine, and they must stay two classes.
    """
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    often = Counter(names)
    return tuple(f"{name} ({number})" if often[name] > 1 else name for number, name in enumerate(names))
