"""Inference: what models say to the images of a split, and a head without training for the frozen backbone.

One pass decodes each image once and shows it to every model, so that all are judged on the same pixels.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples
from stages.runtime.command import StageError
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier

Floats32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

SCALE = 10.0
"""Cosine similarities are within -1 to 1; times this they are logits. Order and accuracy do not depend on it."""


class Answer(NamedTuple):
    """What a model makes of n images."""

    features: Floats32
    """(n, D)"""
    logits: Floats32
    """(n, C)"""


def all_answers(
    samples: Samples, models: Mapping[str, Classifier], *, image_size: int, resize: int, batch_size: int,
    compute: Compute, featured: Collection[str] = (),
) -> dict[str, Answer]:  # fmt: skip
    """Every model's answers to all images, by name, in the order of `samples`.

    Args:
        models: on the device, in evaluation mode.
        featured: whose features are kept; of the others they are (N, 0).

    Raises:
        StageError: a model gives what is not a number.
    """
    kept: dict[str, Answer] = {}
    start = 0
    for batch in answers(samples, models, image_size=image_size, resize=resize, batch_size=batch_size, compute=compute):
        for name, (features, logits) in batch.items():
            if name not in kept:
                width = features.shape[1] if name in featured else 0
                kept[name] = Answer(*(np.empty((len(samples), each), np.float32) for each in (width, logits.shape[1])))
            rows = slice(start, start + len(logits))
            kept[name].logits[rows] = logits
            if name in featured:
                kept[name].features[rows] = features
        start += len(next(iter(batch.values())).logits)
    nothing = Answer(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))
    return {name: kept.get(name, nothing) for name in models}


def answers(
    samples: Samples, models: Mapping[str, Classifier], *, image_size: int, resize: int, batch_size: int,
    compute: Compute,
) -> Iterator[dict[str, Answer]]:  # fmt: skip
    """Every model's answers batch by batch, in the order of `samples`: for what is too many to be kept.

    Raises:
        StageError: a model gives what is not a number.
    """
    batches = evaluation_batches(
        samples, image_size=image_size, resize=resize, batch_size=batch_size,
        threads=compute.threads, device=compute.device,
    )  # fmt: skip
    with torch.inference_mode(), compute.autocast():
        for images, _ in batches:
            yield {name: _answer(name, *model.features_and_logits(images)) for name, model in models.items()}


def _answer(name: str, features: Tensor, logits: Tensor) -> Answer:
    answer = Answer(features.cpu().numpy(), logits.cpu().numpy())
    if not (np.isfinite(answer.features).all() and np.isfinite(answer.logits).all()):
        raise StageError(f"models/{name} gives what is not a number; its weights are damaged or its training diverged")
    return answer


def add_directions(sums: Floats32, features: Floats32, labels: Int64) -> None:
    """Adds up the directions of features (n, D) by class, in place; `unit` of the sums (C, D) is the classes' means."""
    np.add.at(sums, labels, unit(features))


def nearest_class_mean(features: Floats32, means: Floats32) -> Floats32:
    """Logits (N, C) by cosine similarity to the class means: a head that needs no training (Mensink et al. 2013).

    They rank classes; they are no probabilities, so nothing about their calibration means anything.
    """
    logits = (SCALE * unit(features) @ means.T).astype(np.float32)
    # A class without training images cannot be found; at 0 it would come before opposite directions.
    logits[:, ~means.any(axis=1)] = -SCALE
    return logits


def unit(vectors: Floats32) -> Floats32:
    """Of length 1, or 0 where they were: (N, D)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
