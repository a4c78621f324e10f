"""Raw tars: the original bytes of a batch, a deterministic tar a class."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from stages.data.sources import Group


def write_tar(group: Group, folder: Path) -> int:
    """Writes `<folder>/<split>/<class>.tar`: names sorted, no times, no owners. Returns the number of files."""
    path = folder / group.split / f"{group.class_name}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for file in group.files:
            with file.open() as data:
                info = tarfile.TarInfo(file.name)
                info.size = data.seek(0, os.SEEK_END)
                data.seek(0)
                tar.addfile(info, data)
    return len(group.files)


def raw_tars(folder: Path) -> list[Path]:
    """All tars of a batch, sorted."""
    return sorted(folder.rglob("*.tar"))


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset of the first byte, and size in bytes of each file in a tar."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, member.offset_data, member.size


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Bytes of one file in a tar."""
    with path.open("rb") as file:
        return os.pread(file.fileno(), size, offset)
