"""Raw tars for tests, and their facts without the stage."""

import tarfile
from pathlib import Path
from typing import Any

from stages.data.scanning import TarPart, rows_of
from stages.data.sources.parts import Group


def write_tar(group: Group, folder: Path) -> list[str]:
    """Writes `<folder>/<split>/<class>.tar`; returns the names of its files."""
    path = folder / group.split / f"{group.class_name}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for image in group.images():
            info = tarfile.TarInfo(image.name)
            info.size = image.size
            tar.addfile(info, image.data)
            names.append(image.name)
    return names


def scan_tar(path: Path, folder: Path, batch: str) -> list[dict[str, Any]]:
    """Facts (stages/data/raw/facts.py) of every file in a raw tar below `folder`, in the tar's order."""
    return list(rows_of(TarPart(path.relative_to(folder).as_posix(), 0, None), folder, batch, lambda _: None))
