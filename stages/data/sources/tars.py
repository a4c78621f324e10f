"""Tars of other people, read as streams without unpacking: plain files with safe names, or one clear error."""

import bz2
import gzip
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple, Protocol, cast

from stages.data.raw.tars import check_end
from stages.data.sources.locations import LARGEST_FILE, Hidden, Location, check_size, first_line, unreadable
from stages.data.sources.parts import check_path
from stages.runtime.command import StageError

CHUNK = 2**20
HEADERS = 2**16
"""Bytes of headers before one file. Honest ones have a few kilobytes (long names, extended attributes)."""
ONE_HEADER = 2**14
TRAILER = 2**26
"""Bytes after the end of a tar that are still read for the checksum of the compression."""
RATIO, RATIO_FROM = 200, 2**30
"""Images hardly shrink: what expands more than RATIO-fold over more than RATIO_FROM bytes is a bomb."""


class Readable(Protocol):
    """A binary stream."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; none only at the end."""

    def seek(self, offset: int, /) -> int:
        """Moves to a byte."""

    def seekable(self) -> bool:
        """Whether it can."""


class Member(NamedTuple):
    """A plain file in a tar: the parts of its name, its size in bytes, where it begins in the tar, and its bytes."""

    path: list[str]
    size: int
    offset: int
    data: IO[bytes]


class ForwardOnly:
    """A stream that is read from its beginning to its end."""

    def seekable(self) -> bool:
        return False

    def seek(self, _: int) -> int:
        raise io.UnsupportedOperation("seek")


class Checked(ForwardOnly):
    """A stream whose checksum is computed as it is read."""

    def __init__(self, file: Readable, algorithm: str) -> None:
        self._file, self._hash, self.count = file, hashlib.new(algorithm, usedforsecurity=False), 0

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        data = self._file.read(size)
        self._hash.update(data)
        self.count += len(data)
        return data

    def rest(self) -> str:
        """The checksum of the whole stream, in hex."""
        while self.read(CHUNK):
            pass
        return self._hash.hexdigest()


class _Forward:
    """The stream that tarfile reads: forward only, with a budget for headers, and an error at an early end."""

    def __init__(self, file: Readable, where: str) -> None:
        self._file, self._where, self._seekable = file, where, file.seekable()
        self._position, self.headers_left, self.last = 0, HEADERS, b""

    def read(self, size: int) -> bytes:
        """For tarfile: headers."""
        self.headers_left -= size
        if size < 0 or size > ONE_HEADER or self.headers_left < 0:
            raise tarfile.ReadError("a header of an odd size")
        self.last = self.take(size)
        # Python's pattern for these headers takes time by the square of a run of digits.
        if size > tarfile.BLOCKSIZE and re.search(rb"\d{500}", self.last):
            raise tarfile.ReadError("a header of digits")
        return self.last

    def take(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        chunks = []
        while size > 0 and (data := self._read(min(size, CHUNK))):
            chunks.append(data)
            size -= len(data)
            self._position += len(data)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise unreadable(self._where, error) from error

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        """Forward to a byte.

        Raises:
            tarfile.ReadError: it lies behind.
        """
        if position < self._position:
            raise tarfile.ReadError("a file of negative size")
        if self._seekable and position > self._position + CHUNK:
            self._file.seek(position)
            self._position = position
        while self._position < position:
            if not self.take(min(CHUNK, position - self._position)):
                raise tarfile.ReadError("unexpected end of data")
        return self._position


class StreamSection:
    """`size` bytes of a stream from `start` on: a file in a tar, or a tar in a tar."""

    def __init__(self, file: Readable, start: int, size: int) -> None:
        self._file, self._begin, self._size, self._position = file, start, size, 0
        file.seek(start)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        left = max(self._size - self._position, 0)  # a file may claim to end behind it
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data

    def seek(self, offset: int) -> int:
        self._file.seek(self._begin + offset)
        self._position = offset
        return offset

    def seekable(self) -> bool:
        return True  # only what can seek has sections


class _Data:
    """The bytes of one member, while the tar stands there."""

    def __init__(self, stream: _Forward, size: int, where: str) -> None:
        self._stream, self._left, self._where = stream, size, where

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes.

        Raises:
            StageError: the tar ends before the file does.
        """
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._stream.take(wanted)
        if len(data) < wanted:
            raise StageError(f"{self._where} is cut off; bring it whole")
        self._left -= wanted
        return data


def members(file: Readable, where: str, largest: int = LARGEST_FILE, hidden: Hidden | None = None) -> Iterator[Member]:
    """The files of an uncompressed tar, in its order; hidden ones and folders are left out.

    Each one's bytes can be read until the next one is asked for.

    Args:
        file: the stream, at its beginning.
        where: for messages.
        largest: bytes of a file; tars in a tar may be larger than any image.
        hidden: counts the hidden files.

    Raises:
        StageError: it is no tar, or is damaged or cut off, or has what no one should open: links, devices, names that
            lead out of it, files larger than any image.
    """
    stream = _Forward(file, where)
    with _explained(where, stream):
        tar = tarfile.TarFile(fileobj=cast(IO[bytes], stream), mode="r", encoding="utf-8", errors="surrogateescape")
    while True:
        with _explained(where, stream):
            member = _next(tar, stream)
        if member is None:
            return
        path = check_path(member.name, where)
        if path is None and hidden is not None and not member.isdir():
            hidden.add(member.name)
        if path is None or member.isdir():
            continue
        named = f"{where}: {member.name}"
        if not member.isreg() or member.issparse():
            raise StageError(
                f"{named} is no plain file but {_kind(member)}. Make the archive again, with "
                f"`tar --dereference --hard-dereference` to have what links lead to"
            )
        check_size(named, member.size, largest)
        if member.size < 0:
            raise StageError(f"{where} is damaged at byte {member.offset}; bring it whole")
        yield Member(path, member.size, member.offset_data, cast(IO[bytes], _Data(stream, member.size, named)))


def decompressed(file: Readable, where: str) -> Readable:
    """The tar in a stream that may be compressed by gzip or bzip2, told by its first bytes.

    Raises:
        StageError: it is compressed by something else.
    """
    head = b""
    while len(head) < 6 and (more := file.read(6 - len(head))):
        head += more
    resumed = _Resumed(head, file)
    if head.startswith(b"\x1f\x8b"):
        return _Unpacked(cast(IO[bytes], gzip.GzipFile(fileobj=cast(IO[bytes], resumed))), resumed, where)
    if head.startswith(b"BZh"):
        return _Unpacked(cast(IO[bytes], bz2.BZ2File(cast(IO[bytes], resumed))), resumed, where)
    if head.startswith((b"PK\x03\x04", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"Rar!", b"7z")):
        raise StageError(
            f"{where} is none of .tar, .tar.gz, .tgz and .tar.bz2; if it is a zip, name it so; or unpack it"
        )
    if file.seekable():
        file.seek(0)
        return file
    return resumed


@contextmanager
def opened(location: Location, checksum: tuple[str, str] | None = None) -> Iterator[Readable]:
    """The tar at a location, decompressed; at the end its checksum is compared over all its bytes.

    Args:
        location: of the tar.
        checksum: algorithm and expected value in hex, over the file as it is.

    Raises:
        StageError: the checksum is another, or the compressed stream is damaged.
    """
    with location.open() as raw:
        checked = Checked(cast(Readable, raw), checksum[0]) if checksum else None
        tar = decompressed(checked or cast(Readable, raw), str(location))
        yield tar
        if isinstance(tar, _Unpacked):
            tar.finish()
        if checksum and checked:
            compare(location, checksum, checked)


def compare(location: Location, checksum: tuple[str, str], file: Checked) -> None:
    """Reads a file to its end and compares its checksum.

    Raises:
        ChangedError: it is another.
    """
    if (found := file.rest()) != checksum[1]:
        raise ChangedError(
            f"{location} is not what was asked for: its {checksum[0]} is {found}, and the source says "
            f"{checksum[1]}. Nothing of it is kept; bring the right file, or correct the source"
        )


class ChangedError(StageError):
    """The source differs from its checksum, or from what was read before; nothing made of it may stay."""


class _Resumed(ForwardOnly):
    """A stream whose first bytes, `head`, were read already."""

    def __init__(self, head: bytes, file: Readable) -> None:
        self._head, self._file, self.count = head, file, 0

    def read(self, size: int = -1) -> bytes:
        if self._head:
            data, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
        else:
            data = self._file.read(size)
        self.count += len(data)
        return data


class _Unpacked(ForwardOnly):
    """The content of a compressed stream; raises StageError where that is damaged or a bomb."""

    def __init__(self, file: IO[bytes], packed: _Resumed, where: str) -> None:
        self._file, self._packed, self._where, self._count = file, packed, where, 0

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise StageError(f"{self._where} is damaged or cut off ({first_line(error)}); bring it whole") from error
        self._count += len(data)
        if self._count > max(RATIO_FROM, RATIO * self._packed.count):
            raise StageError(f"{self._where} expands more than {RATIO}-fold, as no images do; it is refused as a bomb")
        return data

    def finish(self) -> None:
        """Reads what follows the tar, so that the compression's own checksum is compared."""
        left = TRAILER
        while data := self.read(CHUNK):
            left -= len(data)
            if left < 0:
                raise StageError(f"{self._where} goes on after the end of its tar; make the archive again")


def _next(tar: tarfile.TarFile, stream: _Forward) -> tarfile.TarInfo | None:
    stream.headers_left = HEADERS
    member = tar.next()
    tar.members.clear()  # type: ignore[attr-defined]  # or it would remember all, a kilobyte each
    tar.pax_headers.clear()  # type: ignore[attr-defined]  # of the whole archive: nothing that is asked for
    if member is None:
        check_end(stream.last, tar.offset)
    return member


@contextmanager
def _explained(where: str, stream: _Forward) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, ValueError, TypeError, OverflowError, LookupError, RecursionError) as error:
        what = f"no tar, or damaged before byte {stream.tell()} ({first_line(error)})"
        raise StageError(f"{where} is {what}; bring it whole") from error


def _kind(member: tarfile.TarInfo) -> str:
    kinds = {
        tarfile.SYMTYPE: f"a link to {member.linkname[:200]!r}",
        tarfile.LNKTYPE: f"a hard link to {member.linkname[:200]!r}",
        tarfile.CHRTYPE: "a device",
        tarfile.BLKTYPE: "a device",
        tarfile.FIFOTYPE: "a pipe",
    }
    return kinds.get(member.type, "something else")
