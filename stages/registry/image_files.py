"""Image files as people have them: single files, folders, tars; one by one, in bounded memory.

Folders are read with all that is below them, tars within them too; hidden files are left out.
"""

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stages.data.raw.images import IMAGE_SUFFIXES
from stages.data.raw.tars import check_end
from stages.runtime.command import StageError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged tar raises."""
MAX_FILE_BYTES = 256 * 2**20
"""A larger file is not read."""
BATCH_BYTES = 64 * 2**20
"""A batch ends here, however few images it has, so that large photos do not fill the memory."""


@dataclass(frozen=True)
class ImageFile:
    """A file to predict for, or one that cannot be read."""

    path: str
    data: bytes = b""
    error: str = ""


def count_files(source: Path) -> int:
    """How many files a source has, images or not.

    Raises:
        StageError: it is not there, has no files, or a folder or tar in it cannot be read.
    """
    if not source.exists():
        raise StageError(f"no such file or folder: {source}")
    files = sum(sum(1 for _ in members(path)) if _is_tar(path) else 1 for path in _paths(source))
    if not files:
        raise StageError(f"{source} holds no files (hidden ones are left out)")
    return files


def read_files(sources: Iterable[Path]) -> Iterator[ImageFile | None]:
    """Every file of the sources, in the order of their names; None for one that is no image, unless it is a source.

    Whether a file is an image is decided by its name and its first bytes.
    """
    for source in sources:
        for path in _paths(source):
            if _is_tar(path):
                yield from (_read_member(path, tar, member) for tar, member in members(path))
            else:
                yield _read_file(path, is_source=path == source)


def batches(files: Iterable[ImageFile | None], size: int) -> Iterator[list[ImageFile]]:
    """At most `size` images, and about `BATCH_BYTES` bytes, at a time."""
    batch: list[ImageFile] = []
    volume = 0
    for file in files:
        if file is None:
            continue
        batch.append(file)
        volume += len(file.data)
        if len(batch) == size or volume >= BATCH_BYTES:
            yield batch
            batch, volume = [], 0
    if batch:
        yield batch


def _paths(source: Path) -> Iterator[Path]:
    """The source itself, or the files below it, a folder at a time."""
    if not source.is_dir():
        yield source
        return
    seen = set()
    for root, folders, names in os.walk(source, followlinks=True, onerror=_refuse):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()  # a link to a folder that is read already
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise StageError(f"{error.filename} cannot be read: {error.strerror}")


def _is_tar(path: Path) -> bool:
    """By name."""
    return path.name.lower().endswith(TARS)


def members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The files and links of a tar, compressed or not, in its order.

    Raises:
        StageError: it is no tar, or a damaged one.
    """
    try:
        with tarfile.open(path, "r:*") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it would remember all, a kilobyte each
                hidden = any(part.startswith(".") and part != "." for part in member.name.split("/"))
                if not member.isdir() and not hidden:
                    yield tar, member
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if end := tar.fileobj.read(tarfile.BLOCKSIZE):  # some tars have no end block
                check_end(end, tar.offset)
    except DAMAGED as error:
        raise StageError(f"{path} cannot be read as a tar: {first_line(error)}") from error


def _read_member(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> ImageFile | None:
    name = _readable(f"{path}/{member.name.removeprefix('./')}")
    if not member.isfile():
        return ImageFile(name, error="a link within the tar, which is not followed") if _is_named(name) else None
    try:
        file = tar.extractfile(member)
        assert file is not None  # only links and folders have none
        return _read(name, file, member.size, is_source=False)
    except DAMAGED as error:
        return ImageFile(name, error=f"cannot be read: {first_line(error)}")


def _read_file(path: Path, is_source: bool) -> ImageFile | None:
    name = _readable(str(path))
    if not path.is_file():
        wanted = is_source or _is_named(name)
        return ImageFile(name, error="not a file, or a link that leads nowhere") if wanted else None
    try:
        with path.open("rb") as file:
            return _read(name, file, path.stat().st_size, is_source)
    except OSError as error:
        return ImageFile(name, error=f"cannot be read: {error.strerror}")


def _read(name: str, file: IO[bytes], size: int, is_source: bool) -> ImageFile | None:
    head = file.read(16)
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    if not (is_source or _is_named(name) or webp or head.startswith(MAGIC)):
        return None
    if size > MAX_FILE_BYTES:
        return ImageFile(name, error=f"{size} bytes are more than {MAX_FILE_BYTES}")
    return ImageFile(name, head + file.read())


def _is_named(name: str) -> bool:
    """Whether the name ends as an image's."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _readable(name: str) -> str:
    """As UTF-8, whatever bytes the name of a file has."""
    return name.encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the kind of the error where it has none."""
    return str(error).strip().split("\n")[0].rstrip(":")[:300] or type(error).__name__
