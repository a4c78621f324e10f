"""Figures of a classifier on labelled images: pure functions of arrays, each compared with scikit-learn in the tests.

Conventions that hold throughout:

- *Ties* between logits go to the lower class index, in top-1 as in top-k, as `np.argmax` has it.
- *What is not defined is NaN*, never 0: the recall of a class without images, the precision of a class that is never
  predicted, every figure of no images at all. Means over classes leave NaN out (scikit-learn's `zero_division=nan`).
- *Logits are finite.* Figures are computed in float64, some thousand images at a time, so that 50,000 images of 1,000
  classes need no second copy of their logits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, ndtr

Floats = NDArray[np.floating]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

CHUNK = 4_000_000
"""Logits worked on at once: 32 MB an array."""


def predicted_classes(logits: Floats) -> Int64:
    """The most likely class of each image, (N,) int64."""
    return logits.argmax(axis=1).astype(np.int64)


def log_probabilities(logits: Floats) -> Float64:
    """Log-softmax of (N, C) logits, in float64 whatever comes in."""
    return np.asarray(log_softmax(logits.astype(np.float64), axis=1))


@dataclass(frozen=True)
class ImageScores:
    """Prediction and errors of each image, (N,) each: all that the figures need."""

    predicted: Int64
    rank: Int64
    """Classes that come before the true one: 0 where the prediction is right."""
    confidence: Float64
    loss: Float64
    """In nats."""
    brier: Float64

    @property
    def correct(self) -> Bools:
        """Whether the prediction is right."""
        return self.rank == 0

    def first(self, images: int) -> "ImageScores":
        """Those of the first `images` images."""
        return ImageScores(*(getattr(self, field.name)[:images] for field in fields(self)))


def image_scores(logits: Floats, labels: Int64) -> ImageScores:
    """All scores in one pass over (N, C) logits: with 1,000 classes the passes are what takes the time."""
    parts = [_scores(logits[rows], labels[rows]) for rows in _rows(logits)]
    return ImageScores(*map(np.concatenate, zip(*parts, strict=True)))


def _scores(logits: Floats, labels: Int64) -> tuple[Int64, Int64, Float64, Float64, Float64]:
    powers = _exponentials(logits)
    total = powers.sum(axis=1)
    own = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0].astype(np.float64)
    # Of logits and not of probabilities: those of the least likely classes are 0 in any float.
    loss = np.log(total) + (logits.max(axis=1) - own)
    squares = np.einsum("nc,nc->n", powers, powers) / total**2
    # Rounding may leave a hair below 0 where the label is certain.
    brier = np.maximum(squares - 2 * np.exp(-loss) + 1, 0)
    return predicted_classes(logits), label_ranks(logits, labels), 1 / total, loss, brier


def _exponentials(logits: Floats) -> Float64:
    """Probabilities up to a factor, (N, C): 1 for the most likely class."""
    return np.exp(logits - logits.max(axis=1, keepdims=True).astype(np.float64))


def _rows(logits: Floats) -> Iterator[slice]:
    """All images, some at a time; one empty slice of none."""
    images, step = len(logits), max(1, CHUNK // logits.shape[1])
    for start in range(0, max(images, 1), step):
        yield slice(start, start + step)


def label_ranks(logits: Floats, labels: Int64) -> Int64:
    """How many classes come before the true one, (N,): 0 where the prediction is right."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(axis=1)


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
    correct, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return PerClass(
        support=support,
        predicted=predicted,
        precision=_ratio(correct, predicted),
        recall=_ratio(correct, support),
        f1=f1_scores(correct, support, predicted),
    )


def f1_scores(correct: Int64, support: Int64, predicted: Int64) -> Float64:
    """2 TP / (2 TP + FP + FN) of any shape: 0 if none is right, NaN for a class with neither images nor predictions."""
    return _ratio(2 * correct, support + predicted)


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


def reliability_curve(confidence: Float64, correct: Bools, bins: int) -> Reliability:
    """Accuracy against confidence: where the two are equal, a model that says 0.8 is right eight times in ten.

    Args:
        confidence, correct: (N,) the confidence in each prediction, and whether it is right.
    """
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


def calibration_error(curve: Reliability) -> float:
    """ECE: mean distance of accuracy from confidence over the bins, weighted by their images; NaN of no images.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3. It is never below 0, so on few images it is
    too high even for a perfectly calibrated model.
    """
    return _weighted(np.abs(curve.accuracy - curve.confidence), curve.count)


def debiased_calibration_error(curve: Reliability) -> float:
    """ECE less what the noise of few images adds to it, after Kumar, Liang and Ma 2019; NaN of no images.

    "Verified Uncertainty Calibration": the accuracy of a bin is normal about its own mean. Drawing it once more shows
    how far |accuracy - confidence| is pushed up, and 2 ECE - E[ECE of the draws] takes that off. Their program draws
    1,000 times (`normal_debiased_ce`); this is the mean of a folded normal, without chance. It is the only published
    estimator in the units of ECE: their unbiased one is of the *squared* error, and the sweep of Roelofs et al. 2022
    chooses other bins, so neither could stand beside `ece`.

    It is not cut off at 0, which would be a bias again: below 0, only noise is left. A bin whose images are all right
    or all wrong, such as a bin of one image, has no noise to take off. It removes about two fifths of the bias of a
    perfectly calibrated model, and most of the bias of a model that is far from calibrated.
    """
    gaps = np.abs(curve.accuracy - curve.confidence)
    spread = np.sqrt(_ratio(curve.accuracy * (1 - curve.accuracy), curve.count))
    # Mean of |X| for a normal X with mean `gaps`; in a bin without spread it is the gap.
    far = np.divide(gaps, spread, out=np.full(len(gaps), np.inf), where=spread > 0)
    folded = spread * np.sqrt(2 / np.pi) * np.exp(-(far**2) / 2) + gaps * (1 - 2 * ndtr(-far))
    return _weighted(2 * gaps - folded, curve.count)


@dataclass(frozen=True)
class Selective:
    """Accuracy of a model that may abstain: (N,) each, the k-th entry of its k most confident images."""

    coverage: Float64
    """k / N."""
    accuracy: Float64
    confidence: Float64
    """The lowest of the k: the threshold that keeps these images."""


def selective_curve(confidence: Float64, correct: Bools) -> Selective:
    """Accuracy against coverage when the least confident images are left out (El-Yaniv and Wiener 2010).

    *Images of equal confidence* have no order, so each counts with the mean accuracy of all of them: the average over
    random orders, independent of the order of the files. At coverage 1 it is top-1. The same as scikit-learn's
    `accuracy_score` of the images kept, with those of the last confidence weighted.

    Args:
        confidence, correct: (N,) the confidence in each prediction, and whether it is right.
    """
    order = np.argsort(-confidence, kind="stable")
    starts = tie_starts(confidence[order])
    sizes = np.diff(starts, append=len(order))
    right = np.add.reduceat(correct[order].astype(np.float64), starts) if len(order) else np.empty(0)
    kept = np.arange(1, len(order) + 1)
    return Selective(
        coverage=kept / max(len(order), 1),
        accuracy=np.cumsum(np.repeat(right / sizes, sizes)) / kept,
        confidence=confidence[order],
    )


def tie_starts(ordered: Float64) -> Int64:
    """Where each run of equal values begins in (N,) values in order."""
    return np.flatnonzero(np.diff(ordered, prepend=np.nan) != 0)


def accuracy_at(curve: Selective, coverage: float) -> float:
    """Accuracy on the most confident share of the images, rounded up to whole ones; NaN of no images."""
    kept = math.ceil(round(coverage * len(curve.coverage), 9))
    return float(curve.accuracy[kept - 1]) if kept else float("nan")


def risk_coverage_area(curve: Selective) -> float:
    """AURC: mean error over every number of images kept, 0 (no error) to 1; NaN of no images (Geifman et al. 2019)."""
    return _mean(1 - curve.accuracy)


def _weighted(values: Float64, counts: Int64) -> float:
    """Mean of what is defined, weighted; NaN where nothing counts."""
    return float(np.nansum(counts * values) / counts.sum()) if counts.sum() else float("nan")


def _mean(values: Float64 | Bools) -> float:
    return float(values.mean()) if len(values) else float("nan")


def nan_mean(values: Float64) -> Float64:
    """Mean over the last axis of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))


def _ratio(part: NDArray, whole: NDArray) -> Float64:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
