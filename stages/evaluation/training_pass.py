"""One pass over the training images: class means, probabilities of the labels, and the nearest images to some queries.

There may be a million of them, so features are used batch by batch and not kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stages.data.shards.loading.samples.index import Samples
from stages.evaluation.evaluators.neighbours import NearestImages
from stages.evaluation.inference import Floats32, ImageFormat, add_directions, predict_batches, unit
from stages.evaluation.metrics import Float64, Int64, log_probabilities
from stages.runtime.progress import progress
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier


@dataclass(frozen=True)
class TrainingPredictions:
    """Of N training images of C classes; a feature has D numbers, and there were Q queries."""

    means: Floats32
    """(C, D) mean direction of each class in the backbone's features; zeros for a class without images."""
    own: Float64
    """(N,) probability that the fine-tuned model gives to the label."""
    other: Float64
    """(N,) the largest probability that it gives to another class."""
    suggested: Int64
    """(N,) that class."""
    nearest: Int64
    """(Q, up to 3) the training images most similar to each query, the most similar first."""


def predict_training_images(
    train: Samples,
    models: Mapping[str, Classifier],
    queries: Floats32,
    classes: int,
    image: ImageFormat,
    compute: Compute,
) -> TrainingPredictions:
    """Goes through the labelled training images once.

    Args:
        models: `finetuned` and `backbone`, on the device, in evaluation mode.
        queries: (Q, D) the fine-tuned model's features of the images whose neighbours are wanted.
    """
    own, other = np.empty(len(train)), np.empty(len(train))
    suggested = np.empty(len(train), np.int64)
    nearest = NearestImages(queries)
    sums: Floats32 | None = None
    start = 0
    batches = predict_batches(train, {name: models[name] for name in ("finetuned", "backbone")}, image, compute)
    for batch in progress(batches, -(-len(train) // image.batch_size), "training images"):
        features, logits = batch["finetuned"]
        rows = slice(start, start + len(logits))
        own[rows], other[rows], suggested[rows] = label_probabilities(logits, train.label[rows])
        nearest.add(features, start)
        upstream = batch["backbone"].features
        sums = np.zeros((classes, upstream.shape[1]), np.float32) if sums is None else sums
        add_directions(sums, upstream, train.label[rows])
        start = rows.stop
    means = unit(sums) if sums is not None else np.zeros((classes, 0), np.float32)
    return TrainingPredictions(means, own, other, suggested, nearest.indexes)


def label_probabilities(logits: Floats32, labels: Int64) -> tuple[Float64, Float64, Int64]:
    """The probability of the label, that of the most likely other class, and that class; (n,) each."""
    probabilities = np.exp(log_probabilities(logits))
    rows = np.arange(len(labels))
    own = probabilities[rows, labels].copy()
    probabilities[rows, labels] = -1
    suggested = probabilities.argmax(axis=1)
    return own, np.maximum(probabilities[rows, suggested], 0), suggested
