"""Loading: shards -> batches of uint8 images, decoded by DALI on the CPU or on the GPU from one definition.

Images are picked by index, not read in file order. DALI's own webdataset reader shuffles inside a buffer of
`initial_fill` images and reads one shard set after the other; picking gives every epoch a true permutation, mixes all
batches evenly from the first image to the last, and makes resuming a matter of counting. Pixels depend on (seed, epoch,
place in the epoch) alone: not on the number of threads or processes, not on what ran before.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from stages.data.shards.loading import augmentations
from stages.data.shards.loading.augmentations import Augmentation
from stages.data.shards.loading.crops import Windows, resize, throw_dice, windows
from stages.data.shards.loading.samples.shard_sets import read_index
from stages.runtime.command import StageError
from stages.runtime.files import sha256

if TYPE_CHECKING:
    import torch

READERS = 8
"""Threads that read ahead: a network disk answers slowly, but many at once."""
BATCHES_AHEAD = 1

Encoded = list[npt.NDArray[np.uint8]]


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
        return self.at(np.nonzero(self.label >= 0)[0])

    def at(self, indexes: Sequence[int] | npt.NDArray[np.int64]) -> "Samples":
        """Those at these places, in this order."""
        kept = np.asarray(indexes, np.int64)
        return replace(
            self, key=[self.key[i] for i in kept], batch=self.batch[kept], shard=self.shard[kept],
            offset=self.offset[kept], size=self.size[kept], label=self.label[kept],
        )  # fmt: skip

    def jpeg(self, index: int) -> bytes:
        """The encoded image at `index`.

        Opened each time: a thousand shards are more files than a process may hold open. Read, not mapped: a shard that
        changes under us is then a short read, not a bus error.

        Raises:
            StageError: the shard is gone, cannot be read, or is shorter than it was.
        """
        path, size = self.shards[self.shard[index]], int(self.size[index])
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(file, size, int(self.offset[index]))
            finally:
                os.close(file)
        except OSError as error:
            raise _unusable(path, f"cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise _unusable(path, "was changed while it was read")
        return data


def read_samples(shard_sets: Sequence[Path], split: str) -> Samples:
    """All images of `split` in the shard sets; one that lacks the split adds none.

    Raises:
        StageError: a shard is missing or damaged (checksums of index.json).
    """
    listed = [
        (number, shard_set, entry)
        for number, shard_set in enumerate(shard_sets)
        for entry in read_index(shard_set)["splits"].get(split, {"shards": []})["shards"]
    ]
    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(lambda each: _checked_entries(each[1], each[2]), listed))
    counts = [len(each.key) for each in entries]
    return Samples(
        key=[key for each in entries for key in each.key],
        batch=np.repeat(np.array([number for number, _, _ in listed], np.int32), counts),
        batch_names=[shard_set.name for shard_set in shard_sets],
        shards=[shard_set / entry["file"] for _, shard_set, entry in listed],
        shard=np.repeat(np.arange(len(listed), dtype=np.int32), counts),
        offset=np.concatenate([np.empty(0, np.int64), *(each.offset for each in entries)]),
        size=np.concatenate([np.empty(0, np.int64), *(each.size for each in entries)]),
        label=np.concatenate([np.empty(0, np.int64), *(each.label for each in entries)]),
    )


class _Entries(NamedTuple):
    """The images of one shard, as in `Samples`."""

    key: list[str]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]


def _checked_entries(folder: Path, entry: dict[str, Any]) -> _Entries:
    """What a shard holds, after its checksums were found right."""
    path = folder / entry["file"]
    idx = path.with_suffix(".idx")
    for file, expected in ((path, entry["sha256"]), (idx, entry["idx_sha256"])):
        try:
            found = sha256(file)
        except FileNotFoundError:
            raise _unusable(file, "is missing") from None
        except OSError as error:
            raise _unusable(file, f"cannot be read ({error.strerror})") from error
        if found != expected:
            raise _unusable(file, "is damaged (its checksum is not that of index.json)")
    # jpg, offset, size, name, cls, offset, size, name
    lines = [line.split(" ") for line in idx.read_text(encoding="utf-8").splitlines()[1:]]
    with path.open("rb") as tar:
        labels = [int(os.pread(tar.fileno(), int(line[6]), int(line[5]))) for line in lines]
    return _Entries(
        key=[unquote(line[3].removesuffix(".jpg"), errors="surrogateescape") for line in lines],
        offset=np.array([int(line[1]) for line in lines], np.int64),
        size=np.array([int(line[2]) for line in lines], np.int64),
        label=np.array(labels, np.int64),
    )


def _unusable(file: Path, how: str) -> StageError:
    folder = file.parent
    return StageError(
        f"{file} {how}. Restore it: `rm -rf {folder} && dvc checkout {folder}`, or make it anew: "
        f"`dvc repro --force --single-item shard@{folder.name}`"
    )


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
    threads: int, device: str, start: int = 0, rank: int = 0, world_size: int = 1, flip: bool = True, views: int = 1,
    augmentation: Augmentation | None = None,
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:  # fmt: skip
    """One epoch of training: RandomResizedCrop and horizontal flip, every image exactly once over all processes.

    Args:
        batch_size: over all processes.
        device: `cpu`, or `cuda`: this process's current one, as `torch.cuda.set_device` has it.
        start: the batch to begin with; those before it are neither read nor decoded.
        rank: of this process; it gets its part of every batch.
        world_size: number of processes.
        flip: whether left and right change places in every other crop.
        views: crops of each image, drawn apart.
        augmentation: what is done to crops.

    Raises:
        StageError: a batch has fewer images than there are processes.

    Yields:
        images (views n, 3, image_size, image_size) uint8 in channels-last memory, all of the first view before those of
        the second, and labels (n,) int64, on `device`. Batches are of nearly equal size, at most `batch_size`, and so
        are the parts of the processes.
    """
    batches = _equal_batches(epoch_order(samples, seed, epoch), batch_size)
    if batches and len(batches[-1]) < world_size:
        raise StageError(f"{world_size} processes cannot share a batch of {len(batches[-1])} images; use fewer")
    parts = [np.array_split(batch, world_size)[rank] for batch in batches[start:]]
    numbers = range(start, len(batches))

    def mine(thrown: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Of dice for a whole batch, (views n, any), those for this process's part."""
        by_view = thrown.reshape(views, -1, thrown.shape[1])
        return np.concatenate([np.array_split(each, world_size)[rank] for each in by_view])

    # Thrown when their batch comes: those of a million images are a quarter of a gigabyte.
    dice = (
        mine(throw_dice(np.random.default_rng([seed, epoch, 1, n]), views * len(batches[n]), min_crop_area))
        for n in numbers
    )
    drawn = (
        mine(augmentations.throw_dice(np.random.default_rng([seed, epoch, 2, n]), views * len(batches[n])))
        for n in numbers
    )
    crops = [np.tile(part, views) for part in parts]
    largest = max(map(len, crops), default=0)
    run = _crops_on_gpu if device == "cuda" else _crops_on_cpu
    wanted = augmentation if augmentation and augmentation.is_on else None
    source = _with_windows(samples, crops, dice, flip)
    images = run(source, len(crops), image_size, largest, threads, wanted, drawn)
    yield from _with_labels(images, samples, parts, device)


def evaluation_batches(
    samples: Samples, *, image_size: int, resize: int, batch_size: int, threads: int, device: str,
    rank: int = 0, world_size: int = 1,
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:  # fmt: skip
    """All samples in file order, each exactly once over all processes: shorter side to `resize`, centre crop.

    Each process has a stretch of them, or none where there are fewer images than processes.

    Yields:
        images (n, 3, image_size, image_size) uint8 in channels-last memory, labels (n,) int64, on `device`.
        Batches are of nearly equal size, at most `batch_size`.
    """
    from nvidia.dali import fn, pipeline_def, types

    batches = _equal_batches(np.array_split(np.arange(len(samples)), world_size)[rank], batch_size)
    encoded = _read_ahead(samples, batches)

    @pipeline_def(**_settings(batch_size, threads, device))
    def pipeline() -> Any:
        jpegs = fn.external_source(source=encoded, batch=True, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(jpegs, device=_decoder(device), output_type=types.RGB)
        images = fn.resize(images, resize_shorter=resize, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop(images, crop=(image_size, image_size))

    images = _tensors(pipeline(), len(batches), device)
    yield from _with_labels(images, samples, batches, device)


def _crops_on_cpu(
    source: Iterator[tuple[Encoded, Windows]], count: int, side: int, batch_size: int, threads: int,
    augmentation: Augmentation | None, drawn: Iterator[npt.NDArray[np.float64]],
) -> Iterator["torch.Tensor"]:  # fmt: skip
    """DALI decodes the windows, threads of ours bring them to size, and what is done to them then DALI does again."""
    crops = _plain_crops_on_cpu(source, count, side, batch_size, threads)
    if augmentation is None:
        yield from crops
        return
    from nvidia.dali import fn, pipeline_def, types

    names = augmentations.needed(augmentation)

    def read() -> Iterator[tuple[Any, ...]]:
        for pixels, dice in zip(crops, drawn, strict=True):
            found = augmentations.draws(dice, augmentation)
            yield pixels.permute(0, 2, 3, 1).numpy(), *(getattr(found, name) for name in names)

    @pipeline_def(**_settings(batch_size, threads, "cpu"), enable_conditionals=True)
    def pipeline() -> Any:
        kinds, dimensions = augmentations.input_types(names)
        pixels, *inputs = fn.external_source(
            source=read(), num_outputs=1 + len(kinds), batch=True, dtype=[types.UINT8, *kinds],
            ndim=[3, *dimensions], layout=["HWC", *("" for _ in kinds)],
        )  # fmt: skip
        return augmentations.augmented(pixels, augmentation, inputs, side)

    yield from _tensors(_quietly(pipeline), count, "cpu")


def _plain_crops_on_cpu(
    source: Iterator[tuple[Encoded, Windows]], count: int, side: int, batch_size: int, threads: int
) -> Iterator["torch.Tensor"]:
    """DALI decodes the windows alone; threads of ours bring one batch to size while DALI decodes the next."""
    import cv2
    import torch
    from nvidia.dali import fn, pipeline_def, types

    cv2.setNumThreads(0)  # an image is too small to share out
    mirrored: deque[npt.NDArray[np.bool_]] = deque()

    def read() -> Iterator[tuple[Any, ...]]:
        for jpegs, found in source:
            mirrored.append(found.mirrored)
            yield jpegs, found.anchor, found.shape

    @pipeline_def(**_settings(batch_size, threads, "cpu"))
    def pipeline() -> Any:
        jpegs, anchor, shape = _windowed(read())
        return fn.decoders.image_slice(jpegs, anchor, shape, axis_names="HW", output_type=types.RGB)

    with ThreadPoolExecutor(threads) as pool:
        begun: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()
        for (decoded,) in _run(pipeline(), count):
            out = torch.empty((len(decoded), side, side, 3), dtype=torch.uint8)
            parts = np.array_split(np.arange(len(decoded)), threads)
            flips = mirrored.popleft()
            begun.append((out, [pool.submit(_resize_all, decoded, flips, out.numpy(), part) for part in parts]))
            if len(begun) > 1:
                yield _finished(*begun.popleft())
        while begun:
            yield _finished(*begun.popleft())


def _resize_all(
    decoded: Any, mirrored: npt.NDArray[np.bool_], out: npt.NDArray[np.uint8], which: npt.NDArray[np.int64]
) -> None:
    for index in which:
        resize(np.asarray(decoded[index]), bool(mirrored[index]), out[index])


def _finished(out: "torch.Tensor", parts: "list[Future[None]]") -> "torch.Tensor":
    for part in parts:
        part.result()
    return out.permute(0, 3, 1, 2)


def _crops_on_gpu(
    source: Iterator[tuple[Encoded, Windows]], count: int, side: int, batch_size: int, threads: int,
    augmentation: Augmentation | None, drawn: Iterator[npt.NDArray[np.float64]],
) -> Iterator["torch.Tensor"]:  # fmt: skip
    """All by DALI: the CPU decodes the windows, the GPU does the rest."""
    from nvidia.dali import fn, pipeline_def, types

    own = augmentation or Augmentation()
    names = augmentations.needed(own)

    def read() -> Iterator[tuple[Any, ...]]:
        for (jpegs, found), dice in zip(source, drawn, strict=True):
            more = augmentations.draws(dice, own)
            flips = found.mirrored.astype(np.int32)
            yield jpegs, found.anchor, found.shape, flips, *(getattr(more, name) for name in names)

    @pipeline_def(**_settings(batch_size, threads, "cuda"), enable_conditionals=True)
    def pipeline() -> Any:
        kinds, dimensions = augmentations.input_types(names)
        jpegs, anchor, shape, mirrored, *inputs = _windowed(read(), [types.INT32, *kinds], [0, *dimensions])
        # Not "mixed": beside training nvJPEG brought 1,650 images/s where training takes 4,700 (docs/performance.md).
        images = fn.decoders.image_slice(jpegs, anchor, shape, axis_names="HW", output_type=types.RGB).gpu()
        images = fn.resize(images, size=[side, side], interp_type=types.INTERP_TRIANGULAR, antialias=True)
        return augmentations.augmented(fn.flip(images, horizontal=mirrored), own, inputs, side)

    yield from _tensors(_quietly(pipeline), count, "cuda")


def _windowed(source: Iterator[tuple[Any, ...]], more: Sequence[Any] = (), dimensions: Sequence[int] = ()) -> Any:
    """Nodes of encoded images, anchors and shapes, and of what else follows, by type and number of dimensions."""
    from nvidia.dali import fn, types

    kinds, dimensions = [types.UINT8, types.INT32, types.INT32, *more], [1, 1, 1, *dimensions]
    return fn.external_source(source=source, num_outputs=len(kinds), batch=True, dtype=kinds, ndim=dimensions)


def _settings(batch_size: int, threads: int, device: str) -> dict[str, Any]:
    import torch

    # The process's own, where there are several: labels and model are there too.
    gpu = torch.cuda.current_device() if device == "cuda" else None
    # DALI draws nothing, so its seed decides nothing; without one it would take the time.
    return {"batch_size": max(batch_size, 1), "num_threads": threads, "device_id": gpu, "seed": 0, "exec_dynamic": True}


def _decoder(device: str) -> str:
    return "mixed" if device == "cuda" else "cpu"


def _quietly(define: Callable[[], Any]) -> Any:
    """The pipeline, without DALI's warnings of what its own augmentations use."""
    with warnings.catch_warnings(record=True) as caught:
        pipeline = define()
        pipeline.build()
    for each in caught:
        if not issubclass(each.category, DeprecationWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return pipeline


def _run(pipeline: Any, count: int) -> Iterator[Any]:
    for _ in range(count):
        yield pipeline.run()


def _tensors(pipeline: Any, count: int, device: str) -> Iterator["torch.Tensor"]:
    """DALI's batches (n, H, W, 3) as tensors (n, 3, H, W), without a copy on the CPU."""
    import torch

    copying = torch.cuda.Stream() if device == "cuda" else None
    for (images,) in _run(pipeline, count):
        if copying is None:
            yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
            continue
        # DALI may fill its buffer again as soon as it is let go, so it is copied, and the copy is waited for; on a
        # stream of its own, because a whole step of training may wait in the other.
        with torch.cuda.stream(copying):
            pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).clone()
        copying.synchronize()
        pixels.record_stream(torch.cuda.current_stream())
        yield pixels


def _with_labels(
    images: Iterator["torch.Tensor"], samples: Samples, batches: list[npt.NDArray[np.int64]], device: str
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    import torch

    for pixels, batch in zip(images, batches, strict=True):
        yield pixels, torch.from_numpy(samples.label[batch]).to(device, non_blocking=True)


def _equal_batches(order: npt.NDArray[np.int64], batch_size: int) -> list[npt.NDArray[np.int64]]:
    """Of nearly equal size, so that no last batch is too small for batch normalisation."""
    return np.array_split(order, -(-len(order) // batch_size)) if len(order) else []


def _with_windows(
    samples: Samples, batches: list[npt.NDArray[np.int64]], dice: Iterator[npt.NDArray[np.float64]], flip: bool
) -> Iterator[tuple[Encoded, Windows]]:
    import simplejpeg

    for jpegs, thrown in zip(_read_ahead(samples, batches), dice, strict=True):
        sizes = np.array([simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs], np.int64).reshape(-1, 2)
        found = windows(thrown, sizes)
        yield jpegs, found if flip else found._replace(mirrored=np.zeros_like(found.mirrored))


def _read_ahead(samples: Samples, batches: list[npt.NDArray[np.int64]]) -> Iterator[Encoded]:
    """The encoded images of each batch; those of the next few are being read meanwhile."""

    def read(indexes: npt.NDArray[np.int64]) -> Encoded:
        return [np.frombuffer(samples.jpeg(index), np.uint8) for index in indexes]

    with ThreadPoolExecutor(READERS) as pool:
        begun: deque[list[Future[Encoded]]] = deque()
        for batch in batches:
            begun.append([pool.submit(read, part) for part in np.array_split(batch, min(READERS, len(batch)))])
            if len(begun) > BATCHES_AHEAD:
                yield [jpeg for part in begun.popleft() for jpeg in part.result()]
        while begun:
            yield [jpeg for part in begun.popleft() for jpeg in part.result()]
