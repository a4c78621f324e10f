"""Parquet shards as Hugging Face writes them: a row an image, with the image's bytes and its label."""

import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.sources.labels import MISSING, Label, class_label, group_name, label_of, nested
from stages.data.sources.locations import Location, check_name, check_size, first_line, unreadable
from stages.data.sources.memory import available_memory
from stages.data.sources.parquet_columns import EMBED, Columns, FoundColumns, read_columns
from stages.data.sources.parquet_pages import LARGE, memory_to_read
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


@dataclass(frozen=True)
class ParquetShard(ShardPart):
    """Rows become `<shard>/<row>-<file name>`, as rows may have the same file name."""

    columns: FoundColumns
    memory: int = 0
    """Bytes that reading it may need, where its pages are large."""

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """A row after the other; a row without an image becomes a file of no bytes, for validation to name it.

        Raises:
            StageError: the shard is damaged, or its rows name files that lie elsewhere.
        """
        with _one_large if self.memory > MEMORY else nullcontext():
            for number, (cell, value, group) in enumerate(self._rows(self.columns.image)):
                data, path = self._bytes(cell, number)
                check_size(self._row(number), len(data))
                name, label, group = self._name(number, path), self._label(value, number), self._group(group, number)
                if label.noted:
                    yield Noted(name, label.noted)
                yield Image(self.split, label.class_name, name, len(data), io.BytesIO(data), label.title, group)

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        """The same without the bytes, which are not read."""
        for number, (cell, value, group) in enumerate(self._rows(f"{self.columns.image}.path")):
            path = cell.get("path") if isinstance(cell, dict) else None
            name, label = self._name(number, path), self._label(value, number)
            if label.noted:
                yield Noted(name, label.noted)
            yield Name(self.split, label.class_name, name, label.title, self._group(group, number))

    def _rows(self, column: str) -> Iterator[tuple[Any, Any, Any]]:
        """Cell of the image, label and group of each row; a few rows are in memory."""
        with parquet_file(self.location) as file:
            columns = [column, *filter(None, (self.columns.label, self.columns.group))]
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                found = dict(zip(batch.schema.names, batch.columns, strict=True))
                cells = [
                    _cells(found, path, batch.num_rows)
                    for path in (self.columns.image, self.columns.label, self.columns.group)
                ]
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
        if self.columns.label is None:
            return Label("")
        if isinstance(value, bool):
            value = str(value).lower() if self.columns.class_names is None else int(value)
        if isinstance(value, str) and value and self.columns.class_names is not None:
            if value not in self.columns.class_names:
                raise StageError(f"{self._row(number)}: the label {value[:60]!r} is none of the class names")
            return class_label(value, self._row(number))
        return label_of(value, self.columns.class_names, self._row(number), "?label=COLUMN names another column")

    def _group(self, value: Any, number: int) -> str:
        return group_name(value, self._row(number))

    def _row(self, number: int) -> str:
        return f"{self.location}, row {number}"


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
        if test and any(part.columns.label for part in others) and not any(map(_has_labels, test)):
            left_out = [LeftOut(part.below, "shard of test whose labels were never published") for part in test]
            return Listed("Parquet shards", list(others), tuple(notes), tuple(left_out))
    return Listed("Parquet shards", list(parts), tuple(notes))


def _has_labels(part: ParquetShard) -> bool:
    return any(isinstance(name, Name) and name.class_name for name in part.names())


def _check_alike(parts: list[ParquetShard], where: str) -> None:
    """Refuses shards of which one has labels and another none, or numbers without names: both cannot be meant."""
    with_labels = [part for part in parts if part.columns.label]
    for part in parts if with_labels else ():
        first, own = with_labels[0], part.columns
        if own.label is None and part.split == "test":  # never published
            continue
        if (own.label, own.has_numbers) != (first.columns.label, first.columns.has_numbers):
            what = "kind of labels, numbers or names" if own.label == first.columns.label else "column of labels"
            raise StageError(
                f"source {where}: {first.below} and {part.below} differ in their {what}; name the shards that belong "
                f"together with `*`, and the column with ?label=COLUMN"
            )


def _part(location: Location, split: str, below: str, columns: Columns) -> tuple[ParquetShard, tuple[str, ...]]:
    """The part, and what was guessed of it."""
    with parquet_file(location) as file:
        found, notes = read_columns(str(location), file.schema_arrow, columns)
    entry = location.entry()
    memory = 0 if 0 <= entry.size < LARGE else _memory(location, found.image)
    return ParquetShard(location, split, below, stamp_of([entry]), found, memory), notes


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
