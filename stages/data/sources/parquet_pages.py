"""How much memory a Parquet file takes to read: a reader holds a whole page, and a writer decides how large it is.

pyarrow's and pandas' writers look at a page's size every 1,024 rows only, and put as many into the dictionary before;
with images, a page has hundreds of megabytes. Its size stands in its header, which pyarrow does not show, in Thrift's
compact protocol (https://parquet.apache.org/docs/file-format/ and apache/thrift, doc/specs). The list of pages is read
here too, as pyarrow ends the process where it shows the columns of a damaged one.
"""

import io
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

LARGE = 2**26
"""Bytes of a column in a row group from which its pages are looked at."""
PAGES = 16
"""Pages of a row group that are looked at; the dictionary comes first, and those after it are alike."""
COPIES = 5
"""A page is in memory as stored and decompressed, beside it a dictionary and what is freed late. Measured: 2.0 to 5."""
FOOTER = 2**28
"""Bytes; honest ones have a few kilobytes for a row group."""
LONGEST = 2**26
"""Bytes of a text."""
SIZE, STORED_SIZE = 2, 3
"""Fields of a page's header."""
ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


class _Chunk(NamedTuple):
    """A column in a row group: sizes in bytes, and where in the file it begins."""

    path: str
    size: int
    stored_size: int
    start: int


def memory_to_read(file: IO[bytes], column: str) -> int:
    """Bytes that a reader of a column, or of a struct of columns, may need; 0 where all pages are small.

    It is 0 for a damaged file too, for the reader to name the damage.
    """
    try:
        chunks = [chunk for chunk in _chunks(file) if f"{chunk.path}.".startswith(f"{column}.")]
        return COPIES * max((_largest_page(file, chunk) for chunk in chunks if chunk.size >= LARGE), default=0)
    except ERRORS:
        return 0


def _chunks(file: IO[bytes]) -> Iterator[_Chunk]:
    end = file.seek(-8, io.SEEK_END)
    size = int.from_bytes(file.read(4), "little")
    if end < LARGE or not 0 < size <= min(end, FOOTER):
        return
    file.seek(end - size)
    for group in _struct(io.BytesIO(file.read(size)))[4]:
        for column in group[1]:
            of = column[3]
            start = min(filter(None, (of[9], of.get(11))))  # of the first page of data, of the dictionary
            yield _Chunk(b".".join(of[3]).decode(), of[6], of[7], start)


def _largest_page(file: IO[bytes], chunk: _Chunk) -> int:
    """Bytes of the largest page, decompressed."""
    largest, at = 0, chunk.start
    for _ in range(PAGES):
        if not chunk.start <= at < chunk.start + chunk.stored_size:
            break
        file.seek(at)
        header = _struct(file)
        largest, at = max(largest, header[SIZE]), file.tell() + header[STORED_SIZE]
    return min(largest, chunk.size)


def _struct(file: IO[bytes], depth: int = 8) -> dict[int, Any]:
    """The values of a struct by the number of their field.

    Raises:
        ValueError, IndexError: it is none.
    """
    found, field = dict[int, Any](), 0
    while head := file.read(1)[0]:
        field = field + (head >> 4) if head >> 4 else _whole(file)
        found[field] = _value(file, head & 15, depth)
    return found


def _value(file: IO[bytes], kind: int, depth: int) -> Any:
    if kind in (1, 2):  # true and false
        return kind == 1
    if kind in (4, 5, 6):
        return _whole(file)
    if kind in (3, 7):  # a byte, a double
        return _bytes(file, 1 if kind == 3 else 8)
    if kind == 8:
        return _bytes(file, _varint(file))
    if kind == 9 and depth:
        head = file.read(1)[0]
        of, count = head & 15, head >> 4 if head >> 4 < 15 else _varint(file)
        return [file.read(1)[0] if of in (1, 2) else _value(file, of, depth - 1) for _ in range(count)]
    if kind == 12 and depth:
        return _struct(file, depth - 1)
    raise ValueError(f"a field of kind {kind}")


def _bytes(file: IO[bytes], size: int) -> bytes:
    if size > LONGEST or len(data := file.read(size)) < size:
        raise ValueError(f"a text of {size} bytes")
    return data


def _varint(file: IO[bytes]) -> int:
    value, shift = 0, 0
    while (byte := file.read(1)[0]) & 128:
        value, shift = value | (byte & 127) << shift, shift + 7
        if shift > 63:
            raise ValueError("a number of too many digits")
    return value | byte << shift


def _whole(file: IO[bytes]) -> int:
    number = _varint(file)
    return number >> 1 ^ -(number & 1)
