"""Raw tars for tests as ingest writes them, and their facts without the stage."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.data.scanning import TarPart, rows_of
from stages.data.sources.dispatch import Source
from stages.data.sources.parts import Group
from stages.data.sources.subset import Choice
from stages.data.sources.tar_writing import Tally, assemble, write_parts


def write_tar(group: Group, folder: Path) -> list[str]:
    """Writes `<folder>/<split>/<class>.tar`; returns the names of its files."""
    with TemporaryDirectory() as name:
        work = Path(name)
        made = dict(write_parts(Source("test", [group], Choice()), work, 1, Tally()))
        assemble([made[0]], work, folder)
    return [image.name for image in group.names()]


def scan_tar(path: Path, folder: Path, batch: str) -> list[dict[str, Any]]:
    """Facts (stages/data/raw/facts.py) of every file in a raw tar below `folder`, in the tar's order."""
    return list(rows_of(TarPart(path.relative_to(folder).as_posix(), 0, None), folder, batch, lambda _: None))
