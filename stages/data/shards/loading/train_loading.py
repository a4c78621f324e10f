"""Shards -> training batches of uint8 images, decoded and augmented by DALI on the CPU or on the GPU.

Images are picked by index, not read in file order. DALI's own webdataset reader shuffles inside a buffer of
`initial_fill` images and reads one shard set after the other; picking gives every epoch a true permutation, mixes all
batches evenly from the first image to the last, and makes resuming a matter of counting. Pixels depend on (seed, epoch,
place in the epoch) alone: not on the number of threads or processes, not on what ran before.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from stages.data.shards.loading import augmentations, crops
from stages.data.shards.loading.augmentations import Augmentation
from stages.data.shards.loading.crops import Windows, windows
from stages.data.shards.loading.order import epoch_order
from stages.data.shards.loading.samples.dali import run, settings, tensors, with_labels
from stages.data.shards.loading.samples.index import Encoded, Int64, Samples, equal_batches, read_ahead
from stages.runtime.command import StageError

Floats = npt.NDArray[np.float64]
Windowed = Iterator[tuple[Encoded, Windows]]
"""The encoded images of each batch, with their windows."""
WINDOWED = [types.UINT8, types.INT32, types.INT32]
"""DALI's types of an encoded image, and of its window's anchor and shape."""
NO_AUGMENTATION = Augmentation()


@dataclass(frozen=True)
class TrainLoader:
    """RandomResizedCrop and horizontal flip of training images, augmented; any batch of any epoch."""

    samples: Samples
    batch_size: int
    """Over all processes."""
    min_crop_area: float
    """A crop has at least this share of the image's area."""
    seed: int
    threads: int
    device: str
    """`cpu`, or `cuda`: this process's current one, as `torch.cuda.set_device` has it."""
    flip: bool = True
    """Whether every other crop, at random, is mirrored left to right."""
    views: int = 1
    """Crops of each image, drawn independently."""
    augmentation: Augmentation = NO_AUGMENTATION
    rank: int = 0
    """This process, from 0; it gets its part of every batch."""
    world_size: int = 1

    def batches(self, epoch: int, start: int, image_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch, every image exactly once over all processes.

        Args:
            start: the batch to begin with; those before it are neither read nor decoded.
            image_size: side of the crops in pixels.

        Raises:
            StageError: a batch has fewer images than there are processes.

        Yields:
            images (views n, 3, image_size, image_size) uint8 in channels-last memory, all of the first view before
            those of the second, and labels (n,) int64, on `device`. Batches are of nearly equal size, at most
            `batch_size`, and so are the parts of the processes.
        """
        batches = equal_batches(epoch_order(self.samples, self.seed, epoch), self.batch_size)
        if batches and len(batches[-1]) < self.world_size:
            raise StageError(
                f"{self.world_size} processes cannot share a batch of {len(batches[-1])} images; use fewer"
            )
        sizes = [len(batch) for batch in batches]
        parts = [np.array_split(batch, self.world_size)[self.rank] for batch in batches[start:]]
        of_crops = [np.tile(part, self.views) for part in parts]
        counts = [len(crop_indexes) for crop_indexes in of_crops]
        for_windows = self._draws(epoch, 1, sizes, start, partial(crops.random_draws, min_area=self.min_crop_area))
        for_augmentation = self._draws(epoch, 2, sizes, start, augmentations.random_draws)
        source = _with_windows(self.samples, of_crops, for_windows, self.flip)
        make = self._crops_on_gpu if self.device == "cuda" else self._crops_on_cpu
        images = make(source, for_augmentation, counts, image_size)
        yield from with_labels(images, self.samples, parts, self.device)

    def _draws(
        self, epoch: int, purpose: int, sizes: list[int], start: int, draw: Callable[[np.random.Generator, int], Floats]
    ) -> Iterator[Floats]:
        """Random numbers of each batch from `start` on, (views n, any), for this process's part of n images.

        Drawn when their batch comes: those of a million images are a quarter of a gigabyte.
        """
        for number in range(start, len(sizes)):
            generator = np.random.default_rng([self.seed, epoch, purpose, number])
            drawn = draw(generator, self.views * sizes[number])
            by_view = drawn.reshape(self.views, -1, drawn.shape[1])
            yield np.concatenate([np.array_split(view, self.world_size)[self.rank] for view in by_view])

    def _settings(self, counts: list[int]) -> dict[str, Any]:
        return settings(max(counts, default=0), self.threads, self.device)

    def _crops_on_cpu(
        self, source: Windowed, drawn: Iterator[Floats], counts: list[int], side: int
    ) -> Iterator[Tensor]:
        """DALI decodes; our threads resize; DALI augments. `counts`: crops of each batch."""
        augmentation, plain = self.augmentation, self._plain_crops_on_cpu(source, counts, side)
        if not augmentation.is_on:
            yield from plain
            return
        names = augmentations.needed(augmentation)

        def read() -> Iterator[tuple[Any, ...]]:
            for pixels, numbers in zip(plain, drawn, strict=True):
                chosen = augmentations.choices(numbers, augmentation)
                yield pixels.permute(0, 2, 3, 1).numpy(), *(getattr(chosen, name) for name in names)

        @pipeline_def(**self._settings(counts), enable_conditionals=True)
        def pipeline() -> Any:
            kinds, dimensions = augmentations.input_types(names)
            layout = ["HWC", *("" for _ in kinds)]
            pixels, *inputs = _inputs(read(), [types.UINT8, *kinds], [3, *dimensions], layout=layout)
            return augmentations.augmented(pixels, augmentation, inputs, side)

        yield from tensors(_built(pipeline), len(counts), "cpu")

    def _plain_crops_on_cpu(self, source: Windowed, counts: list[int], side: int) -> Iterator[Tensor]:
        """DALI decodes the windows alone; our threads resize one batch while DALI decodes the next."""
        cv2.setNumThreads(0)  # an image is too small to share out
        mirrored: deque[npt.NDArray[np.bool_]] = deque()

        def read() -> Iterator[tuple[Any, ...]]:
            for jpegs, chosen in source:
                mirrored.append(chosen.mirrored)
                yield jpegs, chosen.anchor, chosen.shape

        @pipeline_def(**self._settings(counts))
        def pipeline() -> Any:
            jpegs, anchor, shape = _inputs(read(), WINDOWED, [1, 1, 1])
            return fn.decoders.image_slice(jpegs, anchor, shape, axis_names="HW", output_type=types.RGB)

        with ThreadPoolExecutor(self.threads) as pool:
            begun: deque[tuple[Tensor, list[Future[None]]]] = deque()
            for (decoded,) in run(pipeline(), len(counts)):
                out = torch.empty((len(decoded), side, side, 3), dtype=torch.uint8)
                parts = np.array_split(np.arange(len(decoded)), self.threads)
                flips = mirrored.popleft()
                begun.append((out, [pool.submit(_resize_all, decoded, flips, out.numpy(), part) for part in parts]))
                if len(begun) > 1:
                    yield _finished(*begun.popleft())
            while begun:
                yield _finished(*begun.popleft())

    def _crops_on_gpu(
        self, source: Windowed, drawn: Iterator[Floats], counts: list[int], side: int
    ) -> Iterator[Tensor]:
        """All by DALI: the CPU decodes the windows, the GPU does the rest."""
        augmentation, names = self.augmentation, augmentations.needed(self.augmentation)

        def read() -> Iterator[tuple[Any, ...]]:
            for (jpegs, chosen), numbers in zip(source, drawn, strict=True):
                more = augmentations.choices(numbers, augmentation)
                flips = chosen.mirrored.astype(np.int32)
                yield jpegs, chosen.anchor, chosen.shape, flips, *(getattr(more, name) for name in names)

        @pipeline_def(**self._settings(counts), enable_conditionals=True)
        def pipeline() -> Any:
            kinds, dimensions = augmentations.input_types(names)
            nodes = _inputs(read(), [*WINDOWED, types.INT32, *kinds], [1, 1, 1, 0, *dimensions])
            jpegs, anchor, shape, mirrored, *inputs = nodes
            # Not "mixed": beside training nvJPEG brought 1,650 images/s where training takes 4,700
            # (docs/performance.md).
            images = fn.decoders.image_slice(jpegs, anchor, shape, axis_names="HW", output_type=types.RGB).gpu()
            images = fn.resize(images, size=[side, side], interp_type=types.INTERP_TRIANGULAR, antialias=True)
            return augmentations.augmented(fn.flip(images, horizontal=mirrored), augmentation, inputs, side)

        yield from tensors(_built(pipeline), len(counts), "cuda")


def _with_windows(samples: Samples, batches: list[Int64], drawn: Iterator[Floats], flip: bool) -> Windowed:
    for jpegs, numbers in zip(read_ahead(samples, batches), drawn, strict=True):
        sizes = np.array([simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs], np.int64).reshape(-1, 2)
        chosen = windows(numbers, sizes)
        yield jpegs, chosen if flip else chosen._replace(mirrored=np.zeros_like(chosen.mirrored))


def _resize_all(decoded: Any, mirrored: npt.NDArray[np.bool_], out: npt.NDArray[np.uint8], part: Int64) -> None:
    for index in part:
        crops.resize(np.asarray(decoded[index]), bool(mirrored[index]), out[index])


def _finished(out: Tensor, parts: list[Future[None]]) -> Tensor:
    for part in parts:
        part.result()
    return out.permute(0, 3, 1, 2)


def _inputs(source: Iterator[tuple[Any, ...]], kinds: list[Any], dimensions: list[int], **more: Any) -> Any:
    """DALI's nodes of what `source` yields, by type and number of dimensions."""
    return fn.external_source(source=source, num_outputs=len(kinds), batch=True, dtype=kinds, ndim=dimensions, **more)


def _built(define: Callable[[], Any]) -> Any:
    """The pipeline, without the deprecation warnings that DALI's own augmentations cause."""
    with warnings.catch_warnings(record=True) as caught:
        pipeline = define()
        pipeline.build()
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return pipeline
