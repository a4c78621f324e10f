"""Inference: what models say to the images of a split, and a head without training for the frozen backbone.

One pass decodes each image once and shows it to every model, so that all are judged on the same pixels.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.command import StageError
from stages.data.loading import Samples, evaluation_batches
from stages.training.devices import Compute
from stages.training.models import Classifier

Floats32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

SCALE = 10.0
"""Cosine similarities are within -1 to 1; times this they are logits. Order and accuracy do not depend on it."""


def logits_and_features(
    samples: Samples,
    classifiers: Mapping[str, Classifier],
    backbones: Mapping[str, Classifier],
    *,
    image_size: int,
    resize: int,
    batch_size: int,
    compute: Compute,
) -> dict[str, Floats32]:
    """Logits of every classifier and features of every backbone, by name, in the order of `samples`.

    Args:
        classifiers: on the device, in evaluation mode; each gives (N, C) float32.
        backbones: the same; each gives (N, D) float32.

    Raises:
        StageError: a model gives what is not a number.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in (*classifiers, *backbones)}
    batches = evaluation_batches(
        samples, image_size=image_size, resize=resize, batch_size=batch_size,
        threads=compute.threads, device=compute.device,
    )  # fmt: skip
    with torch.inference_mode(), compute.autocast():
        for images, _ in batches:
            for name, model in classifiers.items():
                parts[name].append(model(images).float().cpu())
            for name, model in backbones.items():
                parts[name].append(model.features(images).float().cpu())
    return {name: _joined(name, each) for name, each in parts.items()}


def _joined(name: str, parts: list[Tensor]) -> Floats32:
    joined = torch.cat(parts).numpy() if parts else np.empty((0, 0), np.float32)
    if not np.isfinite(joined).all():
        raise StageError(f"models/{name} gives what is not a number; its weights are damaged or its training diverged")
    return joined


def class_means(features: Floats32, labels: Int64, classes: int) -> Floats32:
    """Mean direction of each class, (C, D), of length 1; zeros for a class without images.

    Args:
        features: (N, D), of training images.
        labels: (N,).
    """
    means = np.zeros((classes, features.shape[1]), np.float32)
    # A sum has the direction of the mean.
    np.add.at(means, labels, _unit(features))
    return _unit(means)


def nearest_class_mean(features: Floats32, means: Floats32) -> Floats32:
    """Logits (N, C) by cosine similarity to the class means: a head that needs no training (Mensink et al. 2013).

    They rank classes; they are no probabilities, so nothing about their calibration means anything.
    """
    logits = (SCALE * _unit(features) @ means.T).astype(np.float32)
    # A class without training images cannot be found; at 0 it would come before opposite directions.
    logits[:, ~means.any(axis=1)] = -SCALE
    return logits


def _unit(vectors: Floats32) -> Floats32:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
