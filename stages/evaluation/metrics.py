"""Figures of a classifier on labelled images: pure functions of arrays, each compared with scikit-learn in the tests.

Two conventions hold throughout:

- *Ties* between logits go to the lower class index, in top-1 as in top-k, as `np.argmax` has it.
- *What is not defined is NaN*, never 0: the recall of a class without images, the precision of a class that is never
  predicted, every figure of no images at all. Means over classes leave NaN out (scikit-learn's `zero_division=nan`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Floats = NDArray[np.floating]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


def predictions(logits: Floats) -> Int64:
    """The most likely class of each image, (N,) int64."""
    return logits.argmax(axis=1).astype(np.int64)


def log_probabilities(logits: Floats) -> Float64:
    """Log-softmax of (N, C) logits, in float64 whatever comes in."""
    return np.asarray(log_softmax(logits.astype(np.float64), axis=1))


def confidences(logits: Floats) -> Float64:
    """Probability of the predicted class of each image, (N,) in 0-1."""
    return np.exp(log_probabilities(logits).max(axis=1))


def label_ranks(logits: Floats, labels: Int64) -> Int64:
    """How many classes come before the true one, (N,): 0 where the prediction is right."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(axis=1)


def top_k_correct(logits: Floats, labels: Int64, k: int) -> Bools:
    """Whether the true class is among the k most likely, (N,) bool. With k at or above C it always is."""
    return label_ranks(logits, labels) < k


def top_k_accuracy(logits: Floats, labels: Int64, k: int) -> float:
    """Share of images whose true class is among the k most likely; NaN of no images."""
    return _mean(top_k_correct(logits, labels, k))


def confusion_matrix(labels: Int64, predicted: Int64, classes: int) -> Int64:
    """(C, C) counts: a row per true class, a column per predicted one."""
    cells = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes).astype(np.int64)


@dataclass(frozen=True)
class PerClass:
    """(C,) each; fractions 0-1, NaN where not defined."""

    support: Int64
    predicted: Int64
    precision: Float64
    recall: Float64
    f1: Float64


def per_class(confusion: Int64) -> PerClass:
    """Precision, recall and F1 of each class of a confusion matrix."""
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return PerClass(
        support=support,
        predicted=predicted,
        precision=_ratio(hits, predicted),
        recall=_ratio(hits, support),
        f1=f1_scores(hits, support, predicted),
    )


def f1_scores(hits: Int64, support: Int64, predicted: Int64) -> Float64:
    """2 TP / (2 TP + FP + FN) of any shape: 0 without a hit, NaN for a class with neither images nor predictions."""
    return _ratio(2 * hits, support + predicted)


def macro_f1(confusion: Int64) -> float:
    """Mean F1 of the classes that have images or predictions; NaN of no images."""
    return float(nan_mean(per_class(confusion).f1))


def balanced_accuracy(confusion: Int64) -> float:
    """Mean recall of the classes that have images."""
    return float(nan_mean(per_class(confusion).recall))


def worst_class(confusion: Int64) -> int | None:
    """Index of the class with the lowest recall, the first of equals; None where no class has images."""
    recall = per_class(confusion).recall
    return None if np.isnan(recall).all() else int(np.nanargmin(recall))


def losses(logits: Floats, labels: Int64) -> Float64:
    """Negative log-likelihood of each image's label in nats, (N,). Not clipped: a certain mistake may cost infinity."""
    return -np.take_along_axis(log_probabilities(logits), labels[:, None], axis=1)[:, 0]


def negative_log_likelihood(logits: Floats, labels: Int64) -> float:
    """Mean over the images, in nats; NaN of no images."""
    return _mean(losses(logits, labels))


@dataclass(frozen=True)
class Reliability:
    """A row per bin of confidence, (B,) each; NaN in an empty bin."""

    low: Float64
    high: Float64
    count: Int64
    confidence: Float64
    accuracy: Float64


def bin_indices(confidence: Float64, bins: int) -> Int64:
    """The bin of each confidence, (N,): equal widths over 0-1, open below and closed above (Guo et al. 2017)."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")


def reliability(logits: Floats, labels: Int64, bins: int) -> Reliability:
    """Accuracy against confidence: where the two are equal, a model that says 0.8 is right eight times in ten."""
    confidence, correct = confidences(logits), predictions(logits) == labels
    index = bin_indices(confidence, bins)
    count = np.bincount(index, minlength=bins)
    edges = np.linspace(0, 1, bins + 1)
    return Reliability(
        low=edges[:-1],
        high=edges[1:],
        count=count,
        confidence=_ratio(np.bincount(index, confidence, minlength=bins), count),
        accuracy=_ratio(np.bincount(index, correct, minlength=bins), count),
    )


def expected_calibration_error(logits: Floats, labels: Int64, bins: int) -> float:
    """ECE: mean distance of accuracy from confidence over equal-width bins, weighted by their images; NaN of no images.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3. It is never below 0, and so too high on
    few images even for a perfectly calibrated model.
    """
    curve = reliability(logits, labels, bins)
    if not curve.count.sum():
        return float("nan")
    gaps = np.abs(curve.accuracy - curve.confidence)
    return float(np.nansum(curve.count * gaps) / curve.count.sum())


def _mean(values: Float64 | Bools) -> float:
    return float(values.mean()) if len(values) else float("nan")


def nan_mean(values: Float64) -> Float64:
    """Mean over the last axis of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))


def _ratio(part: NDArray, whole: NDArray) -> Float64:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
