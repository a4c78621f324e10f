"""Writing raw tars: the original bytes of a class, deterministically."""

import hashlib
import os
import tarfile
from pathlib import Path
from typing import IO

from stages.data.sources import Group


class _Hashed:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data


def write_tar(group: Group, folder: Path) -> list[tuple[str, str]]:
    """Writes `<folder>/<split>/<class>.tar`: names sorted, no times, no owners.

    Returns:
        Path (`split/class/name`) and sha256, in hex, of each file as it was written.
    """
    path = folder / group.split / f"{group.class_name}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for file in group.files:
            with file.open() as data:
                info = tarfile.TarInfo(file.name)
                info.size = data.seek(0, os.SEEK_END)
                data.seek(0)
                hashed = _Hashed(data)
                tar.addfile(info, hashed)
            written.append((f"{group.split}/{group.class_name}/{file.name}", hashed.sha256.hexdigest()))
    return written
