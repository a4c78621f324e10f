"""Shards -> batches of whole images for evaluation, decoded by DALI on the CPU or on the GPU from one definition."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from stages.data.shards.loading.samples.dali import settings, tensors, with_labels
from stages.data.shards.loading.samples.index import Samples, equal_batches, read_ahead


def evaluation_batches(
    samples: Samples,
    *,
    image_size: int,
    resize: int,
    batch_size: int,
    threads: int,
    device: str,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples in file order, each exactly once over all processes: shorter side to `resize`, centre crop.

    Each process has a contiguous part of them, or none where there are fewer images than processes.

    Yields:
        images (n, 3, image_size, image_size) uint8 in channels-last memory, labels (n,) int64, on `device`.
        Batches are of nearly equal size, at most `batch_size`.
    """
    batches = equal_batches(np.array_split(np.arange(len(samples)), world_size)[rank], batch_size)
    encoded = read_ahead(samples, batches)

    @pipeline_def(**settings(batch_size, threads, device))
    def pipeline() -> Any:
        jpegs = fn.external_source(source=encoded, batch=True, dtype=types.UINT8, ndim=1)
        decoder = "mixed" if device == "cuda" else "cpu"
        images = fn.decoders.image(jpegs, device=decoder, output_type=types.RGB)
        images = fn.resize(images, resize_shorter=resize, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop(images, crop=(image_size, image_size))

    yield from with_labels(tensors(pipeline(), len(batches), device), samples, batches, device)
