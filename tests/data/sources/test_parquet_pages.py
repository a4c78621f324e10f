"""The memory that a file of large pages takes is known before it is read."""

import io
import os
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data.sources import parquet, parquet_pages
from stages.data.sources.dispatch import read_source
from stages.data.sources.memory import available_memory
from stages.data.sources.parquet_pages import COPIES, memory_to_read
from stages.runtime.command import StageError
from tests.packing import contents

ROWS, SIZE = 1_500, 1_000
OPTIONS: dict[str, dict[str, Any]] = {
    "dictionary": {},
    "plain": {"use_dictionary": False},
    "uncompressed": {"use_dictionary": False, "compression": "none"},
    "zstd": {"compression": "zstd", "data_page_version": "2.0"},
    "statistics": {"write_page_index": True, "write_page_checksum": True},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte is large."""
    monkeypatch.setattr(parquet_pages, "LARGE", 2**17)
    monkeypatch.setattr(parquet, "LARGE", 2**17)
    monkeypatch.setattr(parquet, "MEMORY", 2**20)


def table() -> pa.Table:
    """Images of a kilobyte, as a struct, and a label."""
    draw = random.Random(0)
    cells = [{"bytes": draw.randbytes(SIZE), "path": None} for _ in range(ROWS)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"image": pa.array(cells, kind), "label": [n % 2 for n in range(ROWS)]})


def memory(path: Path, column: str = "image") -> int:
    """As the reader is told."""
    with path.open("rb") as file:
        return memory_to_read(file, column)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_page_of_1024_images_is_seen(tmp_path: Path, options: dict[str, Any]) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", data_page_size=2**16, **options)
    assert COPIES * 1024 * SIZE <= memory(tmp_path / "a.parquet") <= COPIES * ROWS * (SIZE + 9)
    assert memory(tmp_path / "a.parquet", "label") == memory(tmp_path / "a.parquet", "im") == 0


def test_pandas_writes_such_pages(tmp_path: Path) -> None:
    cells = [random.Random(n).randbytes(SIZE) for n in range(ROWS)]
    pd.DataFrame({"image": cells, "label": 0}).to_parquet(tmp_path / "a.parquet")
    assert memory(tmp_path / "a.parquet") >= COPIES * 1024 * SIZE


@pytest.mark.parametrize("options", [{"row_group_size": 100}, {"write_batch_size": 16, "use_dictionary": False}])
def test_small_row_groups_or_pages_are_fine(tmp_path: Path, options: dict[str, Any]) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", data_page_size=2**12, **options)
    assert memory(tmp_path / "a.parquet") < 2**20


def test_too_little_memory_stops_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(), tmp_path / "a.parquet")
    monkeypatch.setattr(parquet, "available_memory", lambda: 2**21)
    with pytest.raises(
        StageError, match=r"a\.parquet keeps .*up to 0\.0 GB of memory, and 0\.0 GB are free.*row_group"
    ):
        read_source(str(tmp_path / "a.parquet"), "")


def test_large_files_are_read_one_at_a_time_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0", "train-1"):
        pq.write_table(table(), tmp_path / f"{name}.parquet")
    source = read_source(str(tmp_path), "")
    (note,) = source.notes
    assert note.startswith("2 files hold hundreds of images in a page: up to 0.0 GB") and note in caplog.text
    reading = cast(Generator[object], source.parts[0].images())
    next(reading)
    assert parquet._one_large.locked()
    reading.close()
    assert not parquet._one_large.locked()
    assert len(contents(source)) == 2 * ROWS


def test_damaged_files_have_no_size(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=500)
    whole, draw = (tmp_path / "a.parquet").read_bytes(), random.Random(1)
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for _ in range(1_000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            where = draw.choice([draw.randrange(200), len(data) - 1 - draw.randrange(footer)])
            data[where] = draw.randrange(256)
        assert memory_to_read(io.BytesIO(bytes(data)), "image") <= COPIES * 2**63
    for odd in (b"x" * 8, os.urandom(2**18), b"\xff" * 2**18):
        assert memory_to_read(io.BytesIO(odd), "image") == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000", "memory.stat": "anon 300\nfile 9\n"}, 700),
        ({"memory.max": "max", "memory.stat": "anon 300\n"}, None),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.stat": "cache 9\ntotal_rss 400\n"}, 600),
        ({"memory.max": "1000", "memory.stat": "anon 1300\n"}, 0),
        ({}, None),
    ],
)
def test_a_container_has_less_memory_than_its_machine(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = available_memory(tmp_path)
    assert found == expected if expected is not None else found > 2**20
