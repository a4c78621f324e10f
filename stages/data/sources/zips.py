"""Zips of other people, read member by member without unpacking: plain files with safe names, or one clear error.

The central directory is read as a stream, so that a million members take no memory; zipfile would hold them all. Each
member's size is limited by what the directory says, and its checksum is compared.
"""

import bz2
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

from stages.data.sources.locations import Hidden, check_size, unreadable
from stages.data.sources.parts import check_path
from stages.data.sources.tars import RATIO, RATIO_FROM, Member
from stages.runtime.command import StageError

CHUNK = 2**20
PIECE = 2**16
END, END64, LOCATOR, CENTRAL, LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
LONGEST_END = 22 + 2**16
STORED, DEFLATED, BZIP2 = 0, 8, 12
METHODS = {
    9: "Deflate64, as Windows does with large ones",
    14: "LZMA",
    93: "Zstandard",
    95: "xz",
    98: "PPMd",
    99: "AES",
}
ENCRYPTED = 0x1 | 0x40 | 0x2000
UTF8 = 0x800
ALL_ONES = 2**32 - 1
UNIX = 3


class _Directory(NamedTuple):
    """Where the central directory lies; `shift` is added to the offsets in it (something lies before the zip)."""

    start: int
    size: int
    members: int
    shift: int
    file_size: int


class _Header(NamedTuple):
    """A member as the central directory has it."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    mode: int
    system: int


def zip_members(file: IO[bytes], data: IO[bytes], where: str, hidden: Hidden | None = None) -> Iterator[Member]:
    """The files of a zip, in the order of its directory; hidden ones and folders are left out.

    Each one's bytes can be read until the next one is asked for.

    Args:
        file: the zip, to read its directory from.
        data: the same once more, to read members from.
        where: for messages.
        hidden: counts the hidden files.

    Raises:
        StageError: it is no zip, or is damaged or cut off, or has what no one should open: links, names that lead out
            of it, encrypted members, files larger than any image, or more bytes than its size can hold.
    """
    try:
        directory = _directory(file, where)
        total = packed = 0
        for header in _headers(file, directory, where):
            total, packed = total + header.size, packed + header.packed
            if packed > directory.file_size or total > max(RATIO_FROM, RATIO * directory.file_size):
                raise StageError(
                    f"{where}: its members overlap, or expand more than {RATIO}-fold, as no images do; it is "
                    f"refused as a bomb"
                )
            name = _name(header)
            path = check_path(name, where)
            if path is None or name.endswith("/"):
                if hidden is not None and not name.endswith("/"):
                    hidden.add(name)
                continue
            named = f"{where}: {name}"
            _check(header, path, named)
            if header.offset + header.packed > directory.start:
                raise _damaged(where, f"{name} goes on into the directory")
            yield Member(
                path, header.size, header.offset, cast(IO[bytes], _MemberData(data, header, directory.start, named))
            )
    except OSError as error:
        raise unreadable(where, error) from error
    except (struct.error, OverflowError, UnicodeDecodeError) as error:
        raise _damaged(where, str(error)) from error


def _directory(file: IO[bytes], where: str) -> _Directory:
    size = file.seek(0, os.SEEK_END)
    start = max(size - LONGEST_END, 0)
    file.seek(start)
    tail = file.read(LONGEST_END)
    place = tail.rfind(END)
    if place < 0 or len(tail) < place + 22:
        raise _damaged(where, "it has no directory at its end")
    disk, _, _, count, length, offset, _ = struct.unpack_from("<HHHHIIH", tail, place + 4)
    end = start + place
    if tail[place - 20 : place - 16] == LOCATOR and place >= 20:
        at = struct.unpack_from("<Q", tail, place - 12)[0]
        for position in (at, end - 20 - 56):  # the second where something lies before the zip
            file.seek(min(position, size))
            head = file.read(56)
            if head[:4] == END64 and len(head) == 56:
                disk, _, _, count, length, offset = struct.unpack_from("<IIQQQQ", head, 16)
                end = position
                break
        else:
            raise _damaged(where, "its directory is not where it says")
    if disk not in (0, 0xFFFF):
        raise StageError(f"{where} is one of several parts of a zip; join them into one")
    if (shift := end - length - offset) < 0:
        raise _damaged(where, "its directory is not where it says")
    return _Directory(offset + shift, length, count, shift, size)


def _headers(file: IO[bytes], directory: _Directory, where: str) -> Iterator[_Header]:
    file.seek(directory.start)
    left, count, held = directory.size, 0, b""
    while left or held:
        if left and len(held) < 2**18:  # a header has at most 196 kB
            more = file.read(min(CHUNK, left))
            if not more:
                raise _damaged(where, "its directory is cut off")
            left, held = left - len(more), held + more
        place = 0
        while place < len(held) and (len(held) - place >= 2**18 or not left):
            header, place = _header(held, place, directory, where)
            count += 1
            yield header
        held = held[place:]
    if count % 2**16 != directory.members % 2**16:  # some programs count no further than 65,535
        raise _damaged(where, f"its directory has {count} members, and says {directory.members}")


def _header(held: bytes, place: int, directory: _Directory, where: str) -> tuple[_Header, int]:
    if held[place : place + 4] != CENTRAL or len(held) < place + 46:
        raise _damaged(where, "its directory holds something else")
    fields = struct.unpack_from("<BBHHHHHIIIHHHHHII", held, place + 4)
    _, system, _, flags, method, _, _, crc, packed, size, name, extra, comment, _, _, mode, offset = fields
    begin = place + 46
    end = begin + name + extra + comment
    if len(held) < end:
        raise _damaged(where, "its directory is cut off")
    size, packed, offset = _zip64(held[begin + name : begin + name + extra], [size, packed, offset])
    text = held[begin : begin + name]
    return _Header(text, flags, method, crc, packed, size, offset + directory.shift, mode >> 16, system), end


def _zip64(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and offset, those that do not fit into 32 bits from the extra field."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            wide = iter(struct.iter_unpack("<Q", extra[place + 4 : place + 4 + length // 8 * 8]))
            return [next(wide, (value,))[0] if value == ALL_ONES else value for value in values]
        place += 4 + length
    return values


def _name(header: _Header) -> str:
    """Marked as UTF-8 or not, it often is; else it is of the old code page that zips had."""
    try:
        name = header.name.decode("utf-8")
    except UnicodeDecodeError:
        name = header.name.decode("utf-8", "surrogateescape") if header.flags & UTF8 else header.name.decode("cp437")
    return name.replace("\\", "/") if header.system == 0 else name


def _check(header: _Header, path: list[str], named: str) -> None:
    if path[0].endswith(":"):
        raise StageError(f"{named} leads out of the archive; nothing of it is taken")
    kind = stat.S_IFMT(header.mode) if header.system == UNIX else 0
    if kind not in (0, stat.S_IFREG):
        what = "a link" if stat.S_ISLNK(header.mode) else "a device or a pipe"
        raise StageError(f"{named} is no plain file but {what}. Make the zip again without `--symlinks` (`-y`)")
    if header.flags & ENCRYPTED or header.method == 99:
        raise StageError(f"{named} is encrypted; unpack it with its password, and name the folder")
    if header.method not in (STORED, DEFLATED, BZIP2):
        method = METHODS.get(header.method, f"method {header.method}")
        raise StageError(f"{named} is compressed by {method}, which is not read; unpack it, and name the folder")
    check_size(named, header.size)
    if header.method == STORED and header.size != header.packed:
        raise StageError(f"{named} is damaged (it is not compressed, and has two sizes); bring the zip whole")


class _MemberData:
    """The bytes of one member: not one more than its directory says, and its checksum compared at the end."""

    def __init__(self, file: IO[bytes], header: _Header, limit: int, where: str) -> None:
        self._file, self._header, self._limit, self._where = file, header, limit, where
        self._left, self._packed_left, self._crc = header.size, header.packed, 0
        self._position, self._ended, self._held = -1, False, b""
        self._unpack: Any = None

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes.

        Raises:
            StageError: the member is damaged or cut off, or has more bytes than it says.
        """
        if self._position < 0:
            self._begin()
        wanted = self._left if size < 0 else min(size, self._left)
        chunks = []
        while wanted > 0:
            data = self._some(wanted)
            chunks.append(data)
            wanted, self._left = wanted - len(data), self._left - len(data)
            self._crc = zlib.crc32(data, self._crc)
        if not self._left and not self._ended:
            self._end()
        return b"".join(chunks)

    def _begin(self) -> None:
        header = self._header
        self._file.seek(header.offset)
        head = self._file.read(30)
        if len(head) < 30 or head[:4] != LOCAL:
            raise self._wrong("it is not where the directory says")
        name, extra = struct.unpack_from("<HH", head, 26)
        if self._file.read(name) != header.name:
            raise self._wrong("its name in the directory is another")
        self._position = header.offset + 30 + name + extra
        if self._position + header.packed > self._limit:
            raise self._wrong("it goes on into the directory")
        if header.method == DEFLATED:
            self._unpack = zlib.decompressobj(-15)
        elif header.method == BZIP2:
            self._unpack = bz2.BZ2Decompressor()

    def _some(self, wanted: int) -> bytes:
        """At least one byte, and at most `wanted`."""
        if self._unpack is None:
            return self._taken(min(wanted, CHUNK))
        try:
            while not self._unpack.eof:
                if self._header.method == BZIP2:
                    more = self._taken(PIECE) if self._unpack.needs_input else b""
                    data = self._unpack.decompress(more, wanted)
                else:
                    data = self._unpack.decompress(self._held or self._taken(PIECE), wanted)
                    self._held = self._unpack.unconsumed_tail
                if data:
                    return bytes(data)
        except (zlib.error, OSError, EOFError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self._wrong(str(error)) from error
        raise self._wrong("it has fewer bytes than it says")

    def _taken(self, size: int) -> bytes:
        self._file.seek(self._position)
        data = self._file.read(min(size, self._packed_left))
        if not data:
            raise self._wrong("it is cut off")
        self._position, self._packed_left = self._position + len(data), self._packed_left - len(data)
        return data

    def _end(self) -> None:
        self._ended = True
        if self._crc != self._header.crc:
            raise self._wrong("its checksum is another")

    def _wrong(self, why: str) -> StageError:
        shown = "".join(each if each.isprintable() else "?" for each in why)
        return StageError(f"{self._where} is damaged ({shown}); bring the zip whole")


def _damaged(where: str, why: str) -> StageError:
    shown = "".join(each if each.isprintable() else "?" for each in why)
    return StageError(f"{where} is no zip, or damaged or cut off ({shown}); bring it whole")
