"""Raw tars, the original bytes of a batch as ingest stores them; the one place that knows their layout.

    <split>/<class>.tar             members <name>: one class of one split
    <split>-NNNNN.tar               members <class>/<name>: mixed, streamed, or pieces of very large classes
    unlabelled/<split>-NNNNN.tar    members <name>: no labels; the class name is empty

The split is train, val, test, or all (one pool).
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.command import StageError

MIXED = re.compile(r"(train|val|test|all)-\d{5,}\.tar")
UNLABELLED = "unlabelled"
SPLITS = ("train", "val", "test", "all")


class Member(NamedTuple):
    """One file of a batch, and where its bytes lie in the tar."""

    split: str
    class_name: str  # empty: unlabelled
    name: str
    offset: int  # of the first byte
    size: int  # in bytes

    @property
    def path(self) -> str:
        """`<split>/<class>/<name>`: its name within the batch."""
        return f"{self.split}/{self.class_name}/{self.name}"


def raw_tars(folder: Path) -> list[Path]:
    """All tars of a batch, sorted."""
    return sorted(folder.rglob("*.tar"))


def members(path: Path, folder: Path) -> Iterator[Member]:
    """The files of one raw tar, in its order.

    Args:
        path: the tar.
        folder: of the batch's raw tars.

    Raises:
        StageError: it is no raw tar, or a damaged one.
    """
    split, class_name = _place(path, folder)
    try:
        with tarfile.open(path, "r:") as tar:
            for each in _files(tar):
                name = _readable(each.name)
                of_class, name = (class_name, name) if class_name is not None else _parted(name)
                yield Member(split, of_class, name, each.offset_data, each.size)
    except FileNotFoundError:
        raise StageError(f"{path} is missing; restore {_restored(folder)}") from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        # A message of several lines, or none, says no more to people than its first line.
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise StageError(f"{path} is damaged ({what}); restore {_restored(folder)}") from error


def read_at(tar: Path, offset: int, size: int) -> bytes:
    """Bytes of one file in a raw tar.

    Raises:
        StageError: the tar is not there.
    """
    try:
        with tar.open("rb") as file:
            return os.pread(file.fileno(), size, offset)
    except FileNotFoundError:
        raise StageError(f"{tar} is missing; `dvc pull` brings it back, or `dvc repro` by ingesting anew") from None


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


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or it would remember all, a kilobyte each
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise tarfile.ReadError(f"{_readable(member.name)!r} is no plain file")
        yield member
    # Python takes a tar whose next header is cut or damaged for one that ends there: it must end in zeros.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
        raise tarfile.ReadError(f"it is cut or damaged at byte {tar.offset}")


def _parted(name: str) -> tuple[str, str]:
    class_name, slash, rest = name.partition("/")
    if not slash or class_name in ("", ".", ".."):
        raise tarfile.ReadError(f"{name!r} is not named <class>/<name>")
    return class_name, rest


def _readable(name: str) -> str:
    """Bytes that are no UTF-8 as `\\xff`: a name goes into Parquet, logs and pages."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _restored(folder: Path) -> str:
    return f"the batch with `dvc checkout --force {folder}` or `dvc pull --force {folder}`"
