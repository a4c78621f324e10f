"""Loading for training: our loader beside torchvision, FFCV, webdataset, LitData, Mosaic streaming and plain DALI.

RandomResizedCrop 224 (area 0.08 to 1) and horizontal flip, batches of 64, 2 threads or worker processes, a true shuffle
where the peer has one, on the same encoded images: as they are, and with the shorter side at 256 px. Ours gives uint8,
as our trainer takes it (the model normalises); the peers give what they give by default. The limit is decoding alone.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench.peers.protocol import MEAN, STD, labelled_images, timed_epoch
from bench.prepared import written_shards
from bench.rounds import ROOT, Bound, Candidate, Goal, Peer, Table, arguments, machine, measured, report, versions
from pipelines.environment import settings
from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.train_loading import TrainLoader

SIZE, BATCH, THREADS = 224, 64, 2
KINDS = {"full size": 4096, "256 px": 256}
"""Shorter side that shards are written with."""
LIMIT = "libjpeg-turbo alone"
DECODING: tuple[str, str, tuple[str, ...]] = ("turbojpeg_decode", "bench", ())
PEERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "torchvision": ("torchvision_folder", "bench", ()),
    "torchvision v2": ("torchvision_folder", "bench", ("--v2",)),
    "FFCV": ("ffcv_jpeg", "ffcv", ()),
    "webdataset": ("webdataset_tars", "bench", ()),
    "LitData": ("litdata_streaming", "bench", ()),
    "Mosaic streaming": ("mosaic_streaming", "bench", ()),
}
GOALS = {"torchvision": 2.5, "FFCV": 1.2}
FIRST_BATCH = 1.5  # seconds
OURS = "Synset"


def main() -> int:
    """Prepares the data, measures, reports."""
    parser = arguments(__doc__)
    parser.add_argument("--epoch", type=int, default=4096, help="images in an epoch, the images repeated until then")
    parser.add_argument("--only", nargs="*", choices=list(PEERS), help="these peers alone")
    parser.add_argument("--work", type=Path, help="keeps the prepared data there, and takes it up again")
    options = parser.parse_args()
    before = machine()
    tables, used = [], versions("nvidia-dali-cuda130", "opencv-python-headless", "simplejpeg", "torch")
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images = _linked(options.images, options.epoch, work / "linked")
        shards = {kind: written_shards(images, side, work / kind) for kind, side in KINDS.items()}
        for kind, shard_set in shards.items():
            tables.append(_speed(kind, shard_set, work / kind, options, used, stack))
        tables.append(_first_batch(shards, options.rounds))
    return report(tables, options, before, used)


def _speed(kind: str, shard_set: Path, work: Path, options: Any, used: dict[str, str], stack: ExitStack) -> Table:
    samples = read_samples([shard_set], "train")
    images = work / "images"
    if not images.is_dir():
        _unpack(samples, images)
    common = ["--images", str(images), "--size", str(SIZE), "--threads", str(THREADS), "--batch", str(BATCH)]
    epochs = iter(range(1, 1_000_000))
    candidates = [
        Candidate(OURS, "ours", lambda: _rate(lambda: _ours(samples, next(epochs)), len(samples))),
        Candidate("DALI alone", "peer", lambda: _rate(lambda: _dali(shard_set, len(samples)), len(samples))),
    ]
    others = PEERS if options.only is None else {name: PEERS[name] for name in options.only}
    for name, (script, environment, more) in (others | {LIMIT: DECODING}).items():
        folder = work / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        peer = stack.enter_context(
            Peer(script, *common, "--work", str(folder), "--epoch", str(len(samples)), *more, environment=environment)
        )
        candidates.append(Candidate(name, "limit" if name == LIMIT else "peer", partial(_go, peer, used)))
    goals = [Goal(OURS, name, ratio) for name, ratio in GOALS.items()]
    return measured(f"loading, {kind}", "images/s", candidates, goals, rounds=options.rounds)


def _go(peer: Peer, used: dict[str, str]) -> float:
    figure = peer.go()["images_per_second"]
    used |= {name: version for name, version in peer.versions.items() if name not in used}
    return figure


def _rate(batches: Callable[[], Iterator[Any]], images: int) -> float:
    return timed_epoch(batches, images)["images_per_second"]


def _ours(samples: Samples, epoch: int) -> Iterator[Any]:
    loader = TrainLoader(samples, batch_size=BATCH, min_crop_area=0.08, seed=1, threads=THREADS, device="cpu")
    return loader.batches(epoch, start=0, image_size=SIZE)


def _dali(shard_set: Path, count: int) -> Iterator[Any]:
    """DALI's webdataset reader and its own cropping, resizing and normalising, as its examples have it."""
    import torch
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    tars = sorted(map(str, shard_set.glob("train-*.tar")))

    @pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=None, seed=1, exec_dynamic=True)
    def pipeline() -> Any:
        read: Any = fn.readers.webdataset(
            paths=tars, index_paths=[tar.replace(".tar", ".idx") for tar in tars], ext=["jpg", "cls"], name="reader",
            random_shuffle=True, initial_fill=1000, pad_last_batch=True, missing_component_behavior="error",
        )  # fmt: skip
        jpegs, labels = read
        crops = fn.decoders.image_random_crop(jpegs, output_type=types.RGB, random_area=[0.08, 1.0])
        crops = fn.resize(crops, size=[SIZE, SIZE], interp_type=types.INTERP_TRIANGULAR)
        mean, std = ([255 * value for value in each] for each in (MEAN, STD))
        flip = fn.random.coin_flip()
        return fn.crop_mirror_normalize(crops, dtype=types.FLOAT, mean=mean, std=std, mirror=flip), labels

    batches: Any = DALIGenericIterator(
        [pipeline()], ["images", "labels"], reader_name="reader", last_batch_policy=LastBatchPolicy.PARTIAL
    )
    for (batch,) in batches:
        assert isinstance(batch["images"], torch.Tensor)
        yield batch["images"], batch["labels"]


def _first_batch(shards: dict[str, Path], rounds: int) -> Table:
    # Bytecode is kept, as `make` and an activated .venv have it; the round that does not count compiles it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | settings()

    def cold(shard_set: Path) -> float:
        command = [sys.executable, "-m", "bench.first_batch", str(shard_set)]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        return float(done.stdout)

    names = {f"{OURS}, {kind}": shard_set for kind, shard_set in shards.items()}
    candidates = [Candidate(name, "ours", partial(cold, shard_set)) for name, shard_set in names.items()]
    bounds = [Bound(name, "at most", FIRST_BATCH) for name in names]
    return measured("first batch, cold process", "seconds", candidates, bounds, rounds=rounds, lower_is_better=True)


def _linked(images: Path, epoch: int, folder: Path) -> Path:
    """A folder of `epoch` links, a folder a class: the images over and over."""
    for number, (path, label) in enumerate(labelled_images(images, epoch)):
        link = folder / f"{label:04d}" / f"{number:06d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path)
    return folder


def _unpack(samples: Samples, folder: Path) -> None:
    """The encoded images as files in a folder a class: peers get the very bytes that we read."""
    for index, label in enumerate(samples.label):
        path = folder / f"{label:04d}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(samples.jpeg(index))


if __name__ == "__main__":
    sys.exit(main())
