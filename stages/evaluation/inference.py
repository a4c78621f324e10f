"""Inference: features and logits of models on the images of a split, and a head without training for the backbone.

One pass decodes each image once and gives it to every model, so that all are judged on the same pixels.
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
"""Factor from cosine similarities, within -1 to 1, to logits. Order and accuracy do not depend on it."""


class ImageFormat(NamedTuple):
    """How images are prepared and batched."""

    image_size: int
    """Side of the centre crop in pixels."""
    resize: int
    """Shorter side in pixels, before the crop."""
    batch_size: int


class ModelOutput(NamedTuple):
    """What a model computes for n images."""

    features: Floats32
    """(n, D), the input of the head."""
    logits: Floats32
    """(n, C)"""


def predict(
    samples: Samples,
    models: Mapping[str, Classifier],
    image: ImageFormat,
    compute: Compute,
    featured: Collection[str] = (),
) -> dict[str, ModelOutput]:
    """Every model's output for all images, by name, in the order of `samples`.

    Args:
        models: on the device, in evaluation mode.
        featured: names of the models whose features are kept; those of the others are (N, 0).

    Raises:
        StageError: a model gives NaN or infinity.
    """
    outputs: dict[str, ModelOutput] = {}
    start = 0
    for batch in predict_batches(samples, models, image, compute):
        for name, (features, logits) in batch.items():
            if name not in outputs:
                widths = features.shape[1] if name in featured else 0, logits.shape[1]
                outputs[name] = ModelOutput(*(np.empty((len(samples), width), np.float32) for width in widths))
            rows = slice(start, start + len(logits))
            outputs[name].logits[rows] = logits
            if name in featured:
                outputs[name].features[rows] = features
        start += len(next(iter(batch.values())).logits)
    nothing = ModelOutput(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))
    return {name: outputs.get(name, nothing) for name in models}


def predict_batches(
    samples: Samples, models: Mapping[str, Classifier], image: ImageFormat, compute: Compute
) -> Iterator[dict[str, ModelOutput]]:
    """Every model's output batch by batch, in the order of `samples`, where all of it would not fit into memory.

    Raises:
        StageError: a model gives NaN or infinity.
    """
    batches = evaluation_batches(samples, **image._asdict(), threads=compute.threads, device=compute.device)
    with torch.inference_mode(), compute.autocast():
        for images, _ in batches:
            yield {name: _checked(name, *model.features_and_logits(images)) for name, model in models.items()}


def _checked(name: str, features: Tensor, logits: Tensor) -> ModelOutput:
    output = ModelOutput(features.cpu().numpy(), logits.cpu().numpy())
    if not (np.isfinite(output.features).all() and np.isfinite(output.logits).all()):
        raise StageError(f"models/{name} gives what is not a number; its weights are damaged or its training diverged")
    return output


def add_directions(sums: Floats32, features: Floats32, labels: Int64) -> None:
    """Adds the directions of features (n, D) to the sums (C, D) of their classes, in place; `unit` gives the means."""
    np.add.at(sums, labels, unit(features))


def nearest_class_mean(features: Floats32, means: Floats32) -> Floats32:
    """Logits (N, C) by cosine similarity to the class means: a head that needs no training (Mensink et al. 2013).

    They rank classes but are no probabilities, so figures of calibration mean nothing for them.
    """
    logits = (SCALE * unit(features) @ means.T).astype(np.float32)
    # A class without training images is never predicted; with 0 it would rank above opposite directions.
    logits[:, ~means.any(axis=1)] = -SCALE
    return logits


def unit(vectors: Floats32) -> Floats32:
    """(N, D) vectors scaled to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
