"""What the peers' scripts share: how they talk to `bench.rounds.Peer`, the images that they read, an epoch timed.

These scripts run in the peers' environment (`bench/environment.py`), which has nothing of the project's own.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
Round = Callable[[], dict[str, float]]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every peer of loading takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--images", type=Path, required=True, help="a folder with a folder of images a class")
    parser.add_argument("--work", type=Path, required=True, help="for prepared data, which a later process takes up")
    parser.add_argument("--size", type=int, default=224, help="of the crops, px")
    parser.add_argument("--threads", type=int, default=2, help="or worker processes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--epoch", type=int, required=True, help="images in an epoch; the images are repeated until then"
    )
    return parser


def serve(packages: Sequence[str], prepare: Callable[[], Round]) -> None:
    """Prepares, says so with the packages' versions, and does a round for each line that comes in."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Libraries print what they like: on this side only answers may come.
    os.dup2(2, 1)
    do_round = prepare()
    versions = {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(do_round()), file=answers, flush=True)


def labelled_images(folder: Path, epoch: int) -> list[tuple[Path, int]]:
    """`epoch` images and the numbers of their classes, the folder's images over and over.

    Raises:
        SystemExit: there are none.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted(name.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        sys.exit(f"{folder} has no images in folders of classes")
    return [found[i % len(found)] for i in range(epoch)]


def prepared(folder: Path, write: Callable[[Path], object]) -> Path:
    """What `write` makes at a path that it is given, moved to `folder` when it is whole; as it is where it is there."""
    if not folder.exists():
        aside = folder.with_name(f"{folder.name}.tmp")
        if aside.is_dir():
            shutil.rmtree(aside)
        aside.unlink(missing_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        aside.rename(folder)
    return folder


def timed_epoch(batches: Callable[[], Iterable[tuple[object, object]]], images: int) -> dict[str, float]:
    """One epoch: seconds from asking for it to the first batch, and the images per second of all that follow it.

    Args:
        batches: makes what gives (images, labels).
        images: that the epoch must have.

    Raises:
        ValueError: it had another number of images.
    """
    began = time.perf_counter()
    first, before, seen = 0.0, 0, 0
    for _, labels in batches():
        seen += len(labels)  # type: ignore[arg-type]
        if not before:
            first, before = time.perf_counter() - began, seen
    seconds = time.perf_counter() - began - first
    if seen != images:
        raise ValueError(f"an epoch of {seen} images, not {images}")
    return {"images_per_second": (seen - before) / seconds, "first_batch_seconds": first}
