"""Loading: shards -> batches of uint8 images, decoded by DALI on the CPU or on the GPU from one definition.

Images are picked by index, not read in file order. DALI's own webdataset reader shuffles inside a buffer of
`initial_fill` images and reads one shard set after the other; picking gives every epoch a true permutation, mixes all
batches evenly from the first image to the last, and makes resuming a matter of counting. Pixels of an epoch depend on
(seed, epoch) alone: not on the number of threads, not on what ran before.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from stages.command import StageError
from stages.data.shard_sets import read_index
from stages.files import sha256

if TYPE_CHECKING:
    import torch

CROP_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Samples:
    """One split of one or more shard sets, in file order."""

    key: list[str]
    batch: npt.NDArray[np.int32]
    """(N,) index into `batch_names`."""
    batch_names: list[str]
    shards: list[Path]
    shard: npt.NDArray[np.int32]
    """(N,) index into `shards`."""
    offset: npt.NDArray[np.int64]
    """(N,) of the image's first byte in its shard."""
    size: npt.NDArray[np.int64]
    """(N,) in bytes."""
    label: npt.NDArray[np.int64]
    """(N,) class index; -1: unlabelled."""

    def __len__(self) -> int:
        return len(self.key)

    def labelled(self) -> "Samples":
        """Without the unlabelled ones."""
        (kept,) = np.nonzero(self.label >= 0)
        return replace(
            self, key=[self.key[i] for i in kept], batch=self.batch[kept], shard=self.shard[kept],
            offset=self.offset[kept], size=self.size[kept], label=self.label[kept],
        )  # fmt: skip

    def jpeg(self, index: int) -> bytes:
        """The encoded image at `index`."""
        with self.shards[self.shard[index]].open("rb") as file:
            return os.pread(file.fileno(), self.size[index], self.offset[index])


def read_samples(shard_sets: Sequence[Path], split: str) -> Samples:
    """All images of `split` in the shard sets; one that lacks the split adds none.

    Raises:
        StageError: a shard is missing or damaged (checksums of index.json).
    """
    shards: list[Path] = []
    batch_of_shard: list[int] = []
    entries: list[list[tuple[str, int, int, int]]] = []
    for number, shard_set in enumerate(shard_sets):
        listed = read_index(shard_set)["splits"].get(split, {"shards": []})["shards"]
        with ThreadPoolExecutor() as pool:
            entries += pool.map(lambda entry, folder=shard_set: _checked_entries(folder, entry), listed)
        shards += [shard_set / entry["file"] for entry in listed]
        batch_of_shard += [number] * len(listed)
    rows = [(*row, shard) for shard, each in enumerate(entries) for row in each]
    shard = np.array([row[4] for row in rows], np.int32)
    return Samples(
        key=[row[0] for row in rows],
        batch=np.array(batch_of_shard, np.int32)[shard] if rows else np.empty(0, np.int32),
        batch_names=[shard_set.name for shard_set in shard_sets],
        shards=shards,
        shard=shard,
        offset=np.array([row[1] for row in rows], np.int64),
        size=np.array([row[2] for row in rows], np.int64),
        label=np.array([row[3] for row in rows], np.int64),
    )


def _checked_entries(folder: Path, entry: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """(key, offset, size, label) of each image of a shard, after its checksums were found right."""
    path = folder / entry["file"]
    idx = path.with_suffix(".idx")
    for file, expected in ((path, entry["sha256"]), (idx, entry["idx_sha256"])):
        if not file.is_file() or sha256(file) != expected:
            state = "damaged (its checksum is not that of index.json)" if file.is_file() else "missing"
            raise StageError(
                f"{file} is {state}. Restore it: `rm -rf {folder} && dvc checkout {folder}`, or make it anew: "
                f"`dvc repro --force --single-item shard@{folder.name}`"
            )
    rows = []
    with path.open("rb") as tar:
        for line in idx.read_text(encoding="utf-8").splitlines()[1:]:
            _, offset, size, name, _, cls_offset, cls_size, _ = line.split(" ")
            label = int(os.pread(tar.fileno(), int(cls_size), int(cls_offset)))
            rows.append((unquote(name.removesuffix(".jpg"), errors="surrogateescape"), int(offset), int(size), label))
    return rows


def epoch_order(samples: Samples, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A new permutation of all samples, (N,), in which every batch is spread evenly over the whole epoch.

    Each batch's images are shuffled and laid at equal distances; merging them by position keeps every stretch of the
    epoch in the proportion of the whole, however small a batch is.
    """
    generator = np.random.default_rng([seed, epoch])
    position = np.empty(len(samples))
    for batch in range(len(samples.batch_names)):
        (members,) = np.nonzero(samples.batch == batch)
        position[generator.permutation(members)] = (np.arange(len(members)) + generator.random()) / max(len(members), 1)
    return np.argsort(position, kind="stable")


def training_batches(
    samples: Samples, *, image_size: int, batch_size: int, min_crop_area: float, seed: int, epoch: int,
    threads: int, device: str,
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:  # fmt: skip
    """One epoch of training: RandomResizedCrop (Szegedy et al. 2015) and horizontal flip, every image exactly once.

    Yields:
        images (n, 3, image_size, image_size) uint8 in channels-last memory, labels (n,) int64, on `device`.
        Batches are of nearly equal size, at most `batch_size`.
    """
    from nvidia.dali import fn, types

    def augment(jpegs: Any) -> Any:
        images = fn.decoders.image_random_crop(
            jpegs, device=_decoder(device), output_type=types.RGB,
            random_area=[min_crop_area, 1.0], random_aspect_ratio=list(CROP_ASPECT), num_attempts=10,
        )  # fmt: skip
        images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_TRIANGULAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip(probability=0.5))

    order = epoch_order(samples, seed, epoch)
    pipeline_seed = int(np.random.default_rng([seed, epoch, 1]).integers(2**31))
    yield from _run(samples, order, augment, batch_size, threads, device, pipeline_seed)


def evaluation_batches(
    samples: Samples, *, image_size: int, resize: int, batch_size: int, threads: int, device: str
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """All samples in file order, each exactly once: shorter side to `resize`, centre crop.

    Yields:
        images (n, 3, image_size, image_size) uint8 in channels-last memory, labels (n,) int64, on `device`.
        Batches are of nearly equal size, at most `batch_size`.
    """
    from nvidia.dali import fn, types

    def centre(jpegs: Any) -> Any:
        images = fn.decoders.image(jpegs, device=_decoder(device), output_type=types.RGB)
        images = fn.resize(images, resize_shorter=resize, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop(images, crop=(image_size, image_size))

    yield from _run(samples, np.arange(len(samples)), centre, batch_size, threads, device, seed=0)


def _decoder(device: str) -> str:
    return "mixed" if device == "cuda" else "cpu"


def _run(
    samples: Samples,
    order: npt.NDArray[np.int64],
    operators: Callable[[Any], Any],
    batch_size: int,
    threads: int,
    device: str,
    seed: int,
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    import torch
    from nvidia.dali import fn, pipeline_def, types

    # Of nearly equal size, so that no last batch is too small for batch normalisation.
    batches = np.array_split(order, -(-len(order) // batch_size)) if len(order) else []
    files = [path.open("rb") for path in samples.shards]

    def read(number: int) -> list[npt.NDArray[np.uint8]]:
        # pread, not a memory map: a shard that changes under us is then a short read, not a bus error.
        if number >= len(batches):
            raise StopIteration
        return [
            np.frombuffer(os.pread(files[samples.shard[i]].fileno(), samples.size[i], samples.offset[i]), np.uint8)
            for i in batches[number]
        ]

    gpu = 0 if device == "cuda" else None

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        seed=seed,
        exec_dynamic=True,
    )
    def pipeline() -> Any:
        return operators(fn.external_source(source=read, batch=True, dtype=types.UINT8, ndim=1))

    try:
        built = pipeline()
        for batch in batches:
            (images,) = built.run()
            labels = torch.from_numpy(samples.label[batch]).to(device, non_blocking=True)
            pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
            if device == "cuda":
                # DALI may fill its buffer again as soon as it is let go, while kernels that read it still wait.
                pixels = pixels.clone()
                torch.cuda.current_stream().synchronize()
            yield pixels, labels
    finally:
        for file in files:
            file.close()
