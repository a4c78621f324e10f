"""What both loaders need of DALI: a pipeline's settings, and its batches as tensors."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stages.data.shards.loading.samples.index import Int64, Samples


def settings(batch_size: int, threads: int, device: str) -> dict[str, Any]:
    """Arguments of `pipeline_def`."""
    # The process's own GPU, where there are several: labels and model are there too.
    gpu = torch.cuda.current_device() if device == "cuda" else None
    # DALI draws nothing, so its seed decides nothing; without one it would take the time.
    return {"batch_size": max(batch_size, 1), "num_threads": threads, "device_id": gpu, "seed": 0, "exec_dynamic": True}


def run(pipeline: Any, count: int) -> Iterator[Any]:
    """The outputs of `count` runs of the pipeline."""
    for _ in range(count):
        yield pipeline.run()


def tensors(pipeline: Any, count: int, device: str) -> Iterator[Tensor]:
    """DALI's batches (n, H, W, 3) as tensors (n, 3, H, W), without a copy on the CPU."""
    copying = torch.cuda.Stream() if device == "cuda" else None
    for (images,) in run(pipeline, count):
        if copying is None:
            yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
            continue
        # DALI may fill its buffer again once it is released, so we copy it and wait for the copy; on a stream of its
        # own, because a whole step of training may wait in the current one.
        with torch.cuda.stream(copying):
            pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).clone()
        copying.synchronize()
        pixels.record_stream(torch.cuda.current_stream())
        yield pixels


def with_labels(
    images: Iterator[Tensor], samples: Samples, batches: list[Int64], device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch of images with its labels (n,) int64, on `device`."""
    for pixels, batch in zip(images, batches, strict=True):
        yield pixels, torch.from_numpy(samples.label[batch]).to(device, non_blocking=True)
