"""Writing raw tars: the original bytes of a class, deterministically."""

import os
import tarfile
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
