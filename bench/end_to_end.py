"""The data plane from end to end: many small images through ingest, scan, validate and shard, then a fresh batch.

Images are made from those of `--images`: cuttings of real pictures, turned and mirrored, coded as JPEG, no two alike.
Prints seconds and peak memory (of all processes, shared pages once) of every stage, of `dvc repro` with nothing to do,
and of a fresh batch, with the stages that ran.
"""

import argparse
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.memory import sampled_memory
from bench.peers.protocol import labelled_images
from bench.rounds import machine
from tests.workspace import Workspace

STAGES = ("ingest", "scan", "validate", "shard")
NOTHING_TO_DO = 5.0  # seconds
CLASSES = 100


def main() -> int:
    """Makes the images, runs the stages, prints the table; 1 with `--check` where nothing to do takes too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="a folder with a folder a class")
    parser.add_argument("--check", action="store_true", help="ends with 1 where nothing to do takes too long")
    parser.add_argument("--count", type=int, default=200_000, help="images of the first batch")
    parser.add_argument("--fresh", type=int, default=2_000, help="images of the batch that comes later")
    parser.add_argument("--work", type=Path, help="keeps everything there (default: a temporary folder)")
    options = parser.parse_args()
    print("{cpu}, {cores} cores, load {load} at the start".format(**machine()), flush=True)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        incoming = work / "incoming"
        _make(options.images, options.count, incoming / "first", seed=1)
        _make(options.images, options.fresh, incoming / "fresh", seed=2)
        (work / "checkout").mkdir()
        workspace = Workspace(work / "checkout", SYNSET_INCOMING=str(incoming))
        batches = {"first": {"role": "pretrain", "source": "first"}}
        _write(workspace, batches)
        for stage in STAGES:
            _timed(f"{stage}, {options.count:,} images", workspace, stage)
        idle = _timed("dvc repro, nothing to do", workspace, "shard")
        _write(workspace, batches | {"fresh": {"role": "pretrain", "source": "fresh"}})
        for stage in STAGES:
            _timed(f"{stage}, {options.fresh:,} more", workspace, stage)
    return int(options.check and idle > NOTHING_TO_DO)


def _write(workspace: Workspace, batches: dict[str, dict[str, str]]) -> None:
    params = workspace.params
    params["batches"] = batches
    workspace.write_params(params)


def _timed(what: str, workspace: Workspace, stage: str) -> float:
    began = time.perf_counter()
    with sampled_memory() as samples:
        done = workspace.run("dvc", "repro", stage)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"dvc repro {stage} failed:\n{done.stdout}")
    ran = re.findall(r"Running stage '([^']+)'", done.stdout)
    print(
        f"{what:<28} {seconds:8.1f} s {max(samples) / 1e6:8.0f} MB  {', '.join(ran) or 'nothing ran'}",
        flush=True,
    )
    return seconds


def _make(images: Path, count: int, folder: Path, seed: int) -> None:
    """`count` JPEGs in folders of classes."""
    import cv2

    if folder.is_dir():
        return
    rng = np.random.default_rng(seed)
    sources = labelled_images(images, count)
    for each in range(CLASSES):
        (folder / f"class_{each:03d}").mkdir(parents=True)
    for number, (path, _) in enumerate(sources):
        picture: Any = cv2.imread(str(path), cv2.IMREAD_COLOR)
        side = min(picture.shape[:2])
        window = int(rng.integers(side // 2, side * 4 // 5))
        row, column = (int(rng.integers(0, length - window + 1)) for length in picture.shape[:2])
        picture = np.rot90(picture[row : row + window, column : column + window], int(rng.integers(4)))
        picture = picture[:, ::-1] if rng.integers(2) else picture
        picture = cv2.resize(np.ascontiguousarray(picture), (48, 48), interpolation=cv2.INTER_CUBIC)
        name = folder / f"class_{number % CLASSES:03d}" / f"{number:07d}.jpg"
        cv2.imwrite(str(name), picture, [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    sys.exit(main())
