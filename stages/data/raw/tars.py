"""Raw tars, the original bytes of a batch as ingest stores them; the one place that knows their layout.

    <split>/<class>.tar             members <name>: one class of one split
    <split>-NNNNN.tar               members <class>/<name>: mixed, streamed, or pieces of very large classes
    unlabelled/<split>-NNNNN.tar    members <name>: no labels; the class name is empty

The split is train, val, test, or all (one pool). The group of an image, where it is in one, is a keyword of the
member's PAX header.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from stages.runtime.command import StageError

MIXED = re.compile(r"(train|val|test|all)-\d{5,}\.tar")
UNLABELLED = "unlabelled"
SPLITS = ("train", "val", "test", "all")
GROUP = "SYNSET.group"
"""Upper case, as POSIX 1003.1 asks of keywords that are no standard's."""
END = bytes(tarfile.BLOCKSIZE)
PLAIN = re.compile(
    rb"([ -~]{1,100})\0*(?<=^.{100})"  # name
    rb".{24}([0-7]{11})\0.{12}([0-7]{6})\0 0\0{100}ustar\x0000"  # mode, owner, group; size; time; checksum; type; link
    rb".{80}\0{167}",  # owner, group, device; no prefix
    re.DOTALL,
)
"""The usual header of a file, by POSIX 1003.1 (ustar). `tarfile` takes five times as long, a tenth of the whole scan of
a small image; it reads the unusual ones."""


class RawFile(NamedTuple):
    """One file of a batch, and where its bytes lie in the tar."""

    split: str
    class_name: str  # empty: unlabelled
    name: str
    offset: int  # of the first byte
    size: int  # in bytes
    group: str = ""  # empty: in none

    @property
    def path(self) -> str:
        """`<split>/<class>/<name>`: its name within the batch."""
        return f"{self.split}/{self.class_name}/{self.name}"


def raw_tars(folder: Path) -> list[Path]:
    """All tars of a batch, sorted."""
    return sorted(folder.rglob("*.tar"))


def members(path: Path, folder: Path, start: int = 0, end: int | None = None) -> Iterator[RawFile]:
    """The files of one raw tar, in its order.

    Args:
        path: the tar.
        folder: of the batch's raw tars.
        start: where the first header is (`part_starts`).
        end: files whose header is here or later are left out.

    Raises:
        StageError: it is no raw tar, or a damaged one.
    """
    split, class_name = _place(path, folder)
    for header, name, offset, size, group in _files(path, folder, start):
        if end is not None and header >= end:
            return
        name = name if name.isascii() else _readable(name)
        try:
            of_class, name = (class_name, name) if class_name is not None else _parted(name)
        except ValueError as error:
            raise _damaged(path, folder, error) from None
        yield RawFile(split, of_class, name, offset, size, group if group.isascii() else _readable(group))


def part_starts(path: Path, folder: Path, size: int) -> list[int]:
    """Offsets of the headers at which parts of at least `size` bytes begin, 0 first.

    Raises:
        StageError: the tar is damaged.
    """
    starts = [0]
    for header, *_ in _files(path, folder, 0):
        if header >= starts[-1] + size:
            starts.append(header)
    return starts


def read_at(tar: Path, offset: int, size: int) -> bytes:
    """Bytes of one file in a raw tar.

    Raises:
        StageError: the tar is not there, or its disk does not give it.
    """
    try:
        with tar.open("rb") as file:
            return os.pread(file.fileno(), size, offset)
    except FileNotFoundError:
        raise StageError(f"{tar} is missing; `dvc pull` brings it back, or `dvc repro` by ingesting anew") from None
    except OSError as error:
        raise unreadable(tar, error) from error


def check_end(block: bytes, at: int) -> None:
    """Checks what follows the last file of a tar: `tarfile` takes a cut or damaged header for the end of the tar.

    Args:
        block: the 512 bytes where the next header would be, or fewer.
        at: offset of the block, in bytes.

    Raises:
        tarfile.ReadError: the block is not all zeros.
    """
    if block != END:
        raise tarfile.ReadError(f"it is cut or damaged at byte {at}")


def unreadable(tar: Path, error: OSError) -> StageError:
    """The message for a raw tar that its disk does not give."""
    return StageError(
        f"{tar} cannot be read: {error.strerror or error}. Where the disk is sound again, `dvc checkout --force {tar}` "
        f"or `dvc pull --force {tar}` restores it"
    )


def _place(path: Path, folder: Path) -> tuple[str, str | None]:
    """Split and class of a raw tar's members; None where each names its own class."""
    place = path.relative_to(folder).parts
    mixed = MIXED.fullmatch(place[-1])
    if len(place) == 2 and place[0] in SPLITS:
        return place[0], path.stem
    if mixed and len(place) == 1:
        return mixed[1], None
    if mixed and place[:-1] == (UNLABELLED,):
        return mixed[1], ""
    raise StageError(f"{path} is none of the raw tars that ingest writes. Remove it, or restore {_restored(folder)}")


def _files(path: Path, folder: Path, start: int) -> Iterator[tuple[int, str, int, int, str]]:
    """Offset of the header, name, offset of the bytes, size and group of each file; it must end as a whole tar does."""
    try:
        with path.open("rb", buffering=0) as file:
            length, at = os.fstat(file.fileno()).st_size, start
            while (block := os.pread(file.fileno(), tarfile.BLOCKSIZE, at)) != END:
                if plain := PLAIN.fullmatch(block):
                    name, size, group = plain[1].decode(), int(plain[2], 8), ""
                    offset = at + tarfile.BLOCKSIZE
                    if int(plain[3], 8) != sum(block) - sum(plain[3]) + 7 * ord(" "):
                        raise tarfile.ReadError("bad checksum")
                else:
                    name, offset, size, group = _odd_file(file, at)
                header, at = at, offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if at > length:
                    raise tarfile.ReadError("unexpected end of data")
                yield header, name, offset, size, group
    except FileNotFoundError:
        raise StageError(f"{path} is missing; restore {_restored(folder)}") from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise _damaged(path, folder, error) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _odd_file(file: IO[bytes], at: int) -> tuple[str, int, int, str]:
    """Name, offset, size and group of a file whose header is not of the plainest kind: a long name, or a group."""
    file.seek(at)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        member = tar.next()
    if member is None:
        raise tarfile.ReadError(f"it is cut or damaged at byte {at}")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise tarfile.ReadError(f"{_readable(member.name)!r} is no plain file")
    return member.name, member.offset_data, member.size, member.pax_headers.get(GROUP, "")


def _damaged(path: Path, folder: Path, error: Exception) -> StageError:
    # Keep the first line of the message: some libraries raise several lines, or none.
    what = (str(error).splitlines() or [type(error).__name__])[0]
    return StageError(f"{path} is damaged ({what}); restore {_restored(folder)}")


def _parted(name: str) -> tuple[str, str]:
    class_name, slash, rest = name.partition("/")
    if not slash or class_name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not named <class>/<name>")
    return class_name, rest


def _readable(name: str) -> str:
    """Bytes that are no UTF-8 as `\\xff`: a name goes into Parquet, logs and pages."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _restored(folder: Path) -> str:
    return f"the batch with `dvc checkout --force {folder}` or `dvc pull --force {folder}`"
