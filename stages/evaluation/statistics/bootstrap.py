"""Bootstrap intervals of figures without a closed form: images are drawn with replacement, the figure computed again.

A resample is stored as counts: how often each image was drawn. One matrix product then gives the means of many
resamples, a sum over columns their confusion matrices, and no array is larger than CHUNK numbers.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from stages.evaluation.metrics import (
    Bools,
    Float64,
    Int64,
    f1_scores,
    macro_f1,
    nan_mean,
    tie_starts,
)

CHUNK = 4_000_000
"""Resampled images held at once: 32 MB an array."""


class Interval(NamedTuple):
    """Both ends belong to it; NaN without images."""

    low: float
    high: float


NOTHING = Interval(float("nan"), float("nan"))


def mean_interval(values: Float64, draws: int, seed: int, confidence: float) -> Interval:
    """BCa bootstrap of a mean over images, such as NLL or Brier, which a few images of high loss make skewed.

    Args:
        values: (N,), one of each image, finite.
    """
    return mean_intervals(values[:, None], draws, seed, confidence)[0]


def mean_intervals(values: Float64, draws: int, seed: int, confidence: float) -> list[Interval]:
    """The same of (N, M) values: M intervals, of the same resamples."""
    if not len(values):
        return [NOTHING] * values.shape[1]
    means = resampled(len(values), draws, seed, lambda counts: counts @ values / len(values))
    estimates = values.mean(axis=0)
    columns = zip(means.T, estimates, (values - estimates).T, strict=True)
    return [bca(drawn, float(estimate), influence, confidence) for drawn, estimate, influence in columns]


def bca(draws: Float64, estimate: float, influence: Float64, confidence: float) -> Interval:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987).

    Percentiles of the draws, corrected for the distance of their median from the estimate (z0), and for how the spread
    of the figure changes with its value (a sixth of the skewness of the influences, his equation 7.3).

    Args:
        draws: (R,) the figure in each resample.
        influence: (N,) derivative of the figure with respect to the weight of each image; up to a factor.
    """
    if np.ptp(influence) == 0 and np.ptp(draws) < 1e-12:
        return Interval(estimate, estimate)  # all images alike: percentiles would miss it by rounding
    below = ((draws < estimate).sum() + (draws == estimate).sum() / 2) / len(draws)
    shift = ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    spread = (influence**2).sum() ** 1.5
    acceleration = (influence**3).sum() / (6 * spread) if spread > 0 else 0.0
    moved = shift + ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    # Of a handful of images with one far off, the end may lie beyond all draws.
    low, high = np.quantile(draws, ndtr(shift + moved / np.maximum(1 - acceleration * moved, 1e-9)))
    return Interval(float(low), float(high))


def difference_intervals(values: Float64, draws: int, seed: int, confidence: float) -> list[Interval]:
    """Symmetric studentised bootstrap (Hall 1988) of (N, M) differences that are paired image by image: M intervals.

    Differences of losses are mostly about 0, with long tails on both sides. Their skewness, which BCa uses, is then
    chance: on 500 images and at 97.7 % top-1 BCa covered the truth in 90 % of 1,200 test sets, this in 94 %.
    """
    if not len(values):
        return [NOTHING] * values.shape[1]
    n, columns, centre = len(values), values.shape[1], values.mean(axis=0)
    away = values - centre
    both = np.concatenate([away, away**2], axis=1)
    moments = resampled(n, draws, seed, lambda counts: counts @ both / n)
    off, variance = moments[:, :columns], moments[:, columns:] - moments[:, :columns] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.abs(off) / np.sqrt(np.maximum(variance, 0))
    # A resample of equal values has no spread, and neither have all values if they are equal.
    largest = np.quantile(np.nan_to_num(errors, nan=0.0, posinf=np.finfo(float).max), confidence, axis=0)
    half = np.where(away.any(axis=0), largest * values.std(axis=0), 0.0)
    half[half > 1e100] = np.nan
    return [Interval(float(mean - each), float(mean + each)) for mean, each in zip(centre, half, strict=True)]


def macro_f1_interval(confusion: Int64, draws: int, seed: int, confidence: float) -> Interval:
    """Reverse percentile bootstrap of macro-F1: 2 estimate - quantile.

    With few images per class macro-F1 is too low, and in a resample once more. Measured coverage of 95 %: 94 % at 100
    images per class, 96 % at 20 and 94 % at 5; of the plain percentile bootstrap 95, 86 and 47 %.

    Args:
        confusion: (C, C) counts.
    """
    classes = len(confusion)
    actual, predicted = np.nonzero(confusion)
    if not len(actual):
        return NOTHING
    scores = cell_draws(
        confusion[actual, predicted], draws, seed, lambda drawn: _macro_f1(drawn, actual, predicted, classes)
    )
    return _reversed(macro_f1(confusion), scores, confidence, 0.0)


def macro_f1_difference_interval(
    labels: Int64, one: Int64, other: Int64, classes: int, draws: int, seed: int, confidence: float
) -> Interval:
    """Of macro-F1(one) - macro-F1(other) on the same images: reverse percentile bootstrap of the pair.

    Args:
        labels, one, other: (N,) true classes and those that the two models predict.
    """
    if not len(labels):
        return NOTHING
    cells, counts = np.unique((labels * classes + one) * classes + other, return_counts=True)
    actual, first, second = cells // classes**2, cells // classes % classes, cells % classes

    def difference(drawn: NDArray) -> Float64:
        return _macro_f1(drawn, actual, first, classes) - _macro_f1(drawn, actual, second, classes)

    scores = cell_draws(counts, draws, seed, difference)
    return _reversed(float(difference(counts[None])[0]), scores, confidence, -1.0)


def selective_draws(confident: Float64, correct: Bools, coverage: float, draws: int, seed: int) -> Float64:
    """AURC and the accuracy on the most confident share of every resample: (draws, 2).

    Args:
        confident, correct: (N,) the confidence in each prediction, and whether it is right; N at least 1.
        coverage: above 0.
    """
    n, order = len(correct), np.argsort(-confident, kind="stable")
    starts, wrong = tie_starts(confident[order]), (~correct[order]).astype(np.float64)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])

    def both(counts: Float64) -> Float64:
        # A group of equal confidence counts with its mean error; without ties each image is a group.
        sizes, errors = np.add.reduceat(counts, starts, axis=1), np.add.reduceat(counts * wrong, starts, axis=1)
        share, last = _share(errors, sizes), np.cumsum(sizes, axis=1)
        first = last - sizes
        # Errors among the k most confident, divided by k, summed over all k that end in the group.
        steps = harmonic[last.astype(np.intp)] - harmonic[first.astype(np.intp)]
        area = ((np.cumsum(errors, axis=1) - errors - first * share) * steps + errors).sum(axis=1) / n
        kept = np.clip(coverage * n - first, 0, sizes)
        return np.stack([area, 1 - (kept * share).sum(axis=1) / (coverage * n)], axis=1)

    return resampled(n, draws, seed, both, columns=8)


def risk_coverage_influence(confident: Float64, correct: Bools) -> Float64:
    """(N,) derivative of AURC, as mean(error x -log(rank / N)), with respect to the weight of each image.

    Two parts: the image's own error, and one rank more for all less confident images. Ties in the order they come.
    """
    wrong, rank = (~correct[np.argsort(-confident, kind="stable")]).astype(np.float64), np.arange(1, len(correct) + 1)
    influence = wrong * -np.log(rank / len(wrong)) - np.cumsum((wrong / rank)[::-1])[::-1]
    return influence - influence.mean()


def resampled(n: int, draws: int, seed: int, statistic: Callable[[Float64], Float64], columns: int = 1) -> Float64:
    """A statistic of every resample of n images: (draws, M).

    Args:
        statistic: maps counts (R, n), how often each image is in each of R resamples, to (R, M).
        columns: how many arrays of the counts' size `statistic` makes; the more, the smaller R is.
    """
    rng, parts = np.random.default_rng(seed), []
    for rows in chunks(draws, n * columns):
        index = rng.integers(0, n, size=(rows, n))
        index += n * np.arange(rows)[:, None]
        counts = np.bincount(index.ravel(), minlength=rows * n).reshape(rows, n)
        parts.append(statistic(counts.astype(np.float64)))
    return np.concatenate(parts)


def cell_draws(counts: Int64, draws: int, seed: int, statistic: Callable[[NDArray], Float64]) -> Float64:
    """A statistic of every resample of images that differ only in their cell: (draws,).

    Few cells are drawn from a multinomial, which is far cheaper than drawing images; many cells would cost more.

    Args:
        counts: (K,) images in each cell, at least 1.
        statistic: of (R, K) counts; gives (R,).
    """
    n = int(counts.sum())
    if 8 * len(counts) > n:
        starts = np.cumsum(counts) - counts
        return resampled(n, draws, seed, lambda drawn: statistic(np.add.reduceat(drawn, starts, axis=1)), columns=4)
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [statistic(rng.multinomial(n, counts / n, size=rows)) for rows in chunks(draws, 8 * len(counts))]
    )


def percentiles(draws: Float64, confidence: float) -> Interval:
    """The interval that holds the middle `confidence` of the draws."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def chunks(draws: int, width: int) -> Iterator[int]:
    """`draws` split into parts of about CHUNK numbers, in rows of `width`."""
    rows = max(1, CHUNK // width)
    for start in range(0, draws, rows):
        yield min(rows, draws - start)


def _reversed(estimate: float, draws: Float64, confidence: float, least: float) -> Interval:
    """Reverse percentiles, cut to the range of the figure: `least` to 1."""
    low, high = percentiles(draws, confidence)
    return Interval(max(least, 2 * estimate - high), min(1.0, 2 * estimate - low))


def _macro_f1(drawn: NDArray, actual: Int64, predicted: Int64, classes: int) -> Float64:
    """Macro-F1 (R,) of counts (R, K) in cells with these true and predicted classes (K,)."""
    right = actual == predicted
    correct = _sums(drawn[:, right], actual[right], classes)
    return nan_mean(f1_scores(correct, _sums(drawn, actual, classes), _sums(drawn, predicted, classes)))


def _sums(values: NDArray, groups: Int64, count: int) -> NDArray:
    """(R, K) values summed over the columns of each group: (R, count)."""
    sums = np.zeros((len(values), count), dtype=values.dtype)
    if not len(groups):
        return sums
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sums[:, groups[order][starts]] = np.add.reduceat(values[:, order], starts, axis=1)
    return sums


def _share(part: Float64, whole: Float64) -> Float64:
    """part / whole, 0 where both are."""
    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole > 0)
