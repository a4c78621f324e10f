"""Scanning images for facts, on one core: our stage beside a full decode with Pillow.

Ours reads a raw tar, decodes strictly at reduced scale, takes sha256, hash, brightness and contrast, and writes
Parquet. Pillow opens the files of the folder and decodes all pixels.

    python -m bench.scan --images DIR [--check] [--json FILE]
"""

import sys
import tarfile
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import cv2
from PIL import Image

from bench.rounds import Candidate, Goal, arguments, machine, measured, report, versions
from stages.data.raw.images import read_header
from stages.data.scanning import TarPart, write_part
from stages.runtime.command import StageError, run

OURS, PEER = "scan", "PIL full decode"
IMAGES = 1300
"""At least so many a round, as in a class of ImageNet: a small folder's again and again."""
GOAL = 1.5


def scanned(tar: str, folder: Path, images: int) -> float:
    """Images a second of CPU time, their facts on the disk included."""
    began = time.process_time()
    write_part(TarPart(tar, 0, None), lambda _: None, folder, "bench", folder / "work")
    return images / (time.process_time() - began)


def decoded(paths: list[Path]) -> float:
    """Images a second of CPU time."""
    began = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return len(paths) / (time.process_time() - began)


def images_below(folder: Path) -> list[Path]:
    """Image files, by content, at least `IMAGES` of them.

    Raises:
        StageError: there is none.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and read_header(path.read_bytes()).format]
    if not found:
        raise StageError(f"{folder} has no image")
    return list(islice(cycle(found), max(len(found), IMAGES)))


def write_raw_tar(paths: list[Path], path: Path) -> None:
    """The images as ingest stores those of a class."""
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, image in enumerate(paths):
            info = tarfile.TarInfo(f"{number:08d}{image.suffix}")
            info.size = image.stat().st_size
            with image.open("rb") as file:
                tar.addfile(info, file)


def main() -> None:
    """Measures, and prints the table."""
    options = arguments(__doc__).parse_args()
    before = machine()
    cv2.setNumThreads(1)
    paths = images_below(options.images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_raw_tar(paths, folder / "train/n01.tar")
        table = measured(
            options.images.name,
            "images/s",
            [
                Candidate(OURS, "ours", partial(scanned, "train/n01.tar", folder, len(paths))),
                Candidate(PEER, "peer", partial(decoded, paths)),
            ],
            [Goal(OURS, PEER, GOAL)],
            rounds=options.rounds,
        )
    packages = versions("pillow", "simplejpeg", "opencv-python-headless", "numpy", "pyarrow")
    sys.exit(report([table], options, before, packages))


if __name__ == "__main__":
    run(main)
