"""Raw tars: the original bytes of a batch, `<split>/<class>.tar`."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from stages.command import StageError


def raw_tars(folder: Path) -> list[Path]:
    """All tars of a batch, sorted."""
    return sorted(folder.rglob("*.tar"))


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset of the first byte, and size in bytes of each file in a tar."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, member.offset_data, member.size


def read_at(tar: Path, offset: int, size: int) -> bytes:
    """Bytes of one file in a raw tar.

    Raises:
        StageError: the tar is not there.
    """
    try:
        with tar.open("rb") as file:
            return os.pread(file.fileno(), size, offset)
    except FileNotFoundError:
        raise StageError(f"{tar} is missing; `dvc pull` or `dvc repro ingest@{tar.parts[-3]}` brings it back") from None
