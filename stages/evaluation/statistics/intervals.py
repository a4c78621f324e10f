"""How far a figure can be trusted: intervals, and exact tests between two models on the same images.

The right kind for each: Wilson for proportions, a bootstrap over images for what has no closed form, and *paired*
differences where two models answered the same images, since most of their errors are shared.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, betainc, betaincinv, ndtri

from stages.evaluation.metrics import (
    Answers,
    Bools,
    Float64,
    Floats,
    Int64,
    accuracy_at,
    answers,
    balanced_accuracy,
    bin_indices,
    binned,
    calibration_error,
    confidences,
    confusion_matrix,
    debiased_calibration_error,
    macro_f1,
    per_class,
    risk_coverage_area,
    selective_curve,
    worst_class,
)
from stages.evaluation.statistics import bootstrap
from stages.evaluation.statistics.bootstrap import NOTHING, Interval
from stages.params.evaluate import Evaluate

COVERAGE = 0.8
"""Share of the images on which the selective accuracy is stated: one in five is left to a person."""


def figures(logits: Floats, labels: Int64, settings: Evaluate, calibrated: bool = True) -> dict[str, float]:
    """Every figure of one model on one set of images, with the ends of its interval: as reports/metrics.json has them.

    `ece_debiased` has no ends of its own: those of `ece` are of what both of them estimate.

    Args:
        calibrated: the logits claim probabilities; without it NLL, Brier and ECE are NaN, and so is what the
            confidence decides: selective accuracy and AURC.
    """
    n, confidence = len(labels), settings.confidence
    said = answers(logits, labels)
    confusion = confusion_matrix(labels, said.predicted, logits.shape[1])
    top1, top5 = (int((said.rank < k).sum()) for k in (1, 5))
    macro = bootstrap.macro_f1_interval(confusion, settings.bootstrap, settings.seed, confidence)
    return {
        "count": n,
        **_with_ends("top1", _proportion(top1, n), Interval(*map(float, wilson(top1, n, confidence)))),
        **_with_ends("top5", _proportion(top5, n), Interval(*map(float, wilson(top5, n, confidence)))),
        **_with_ends("macro_f1", macro_f1(confusion), macro),
        **_with_ends(
            "balanced_accuracy", balanced_accuracy(confusion), balanced_accuracy_interval(confusion, confidence)
        ),
        **_worst_class(confusion, confidence),
        # Of no images nothing is defined.
        **_of_probabilities(said if calibrated else said.first(0), settings),
    }


def _of_probabilities(said: Answers, settings: Evaluate) -> dict[str, float]:
    sure, correct, bins = said.confidence, said.correct, settings.calibration_bins
    how = settings.bootstrap, settings.seed, settings.confidence
    nll, brier = bootstrap.mean_intervals(np.stack([said.loss, said.brier], axis=1), *how)
    aurc, selective = selective_intervals(sure, correct, COVERAGE, *how)
    curve, kept = binned(sure, correct, bins), selective_curve(sure, correct)
    return {
        **_with_ends("nll", _mean(said.loss), nll),
        **_with_ends("brier", _mean(said.brier), brier),
        **_with_ends("ece", calibration_error(curve), calibration_interval(sure, correct, bins, *how)),
        "ece_debiased": debiased_calibration_error(curve),
        **_with_ends("aurc", risk_coverage_area(kept), aurc),
        **_with_ends("selective_top1_80", accuracy_at(kept, COVERAGE), selective),
    }


def gain(one: Floats, other: Floats, labels: Int64, settings: Evaluate, calibrated: bool = True) -> dict[str, float]:
    """What `one` is better than `other` on the same images: differences with their ends, and McNemar's p of top-1.

    *Above 0 `one` is better*, in every figure: NLL and Brier, where less is better, are the other's less its own.
    Top-1 and top-5 have Tango's interval, which does not vanish where the two hardly ever differ.

    Args:
        one, other: (N, C) logits of the same images in the same order.
        calibrated: both claim probabilities; without it NLL and Brier are NaN.
    """
    how = settings.bootstrap, settings.seed, settings.confidence
    own, others = answers(one, labels), answers(other, labels)
    saved = np.stack([others.loss - own.loss, others.brier - own.brier], axis=1)[: len(labels) if calibrated else 0]
    nll, brier = bootstrap.difference_intervals(saved, *how)
    classes, first, second = one.shape[1], own.predicted, others.predicted
    f1, other_f1 = (macro_f1(confusion_matrix(labels, each, classes)) for each in (first, second))
    f1_ends = bootstrap.macro_f1_difference_interval(labels, first, second, classes, *how)
    return {
        **_gain_in_accuracy("top1", own.rank < 1, others.rank < 1, settings.confidence),
        **_gain_in_accuracy("top5", own.rank < 5, others.rank < 5, settings.confidence),
        **_with_ends("macro_f1", f1 - other_f1, f1_ends),
        **_with_ends("nll", _mean(saved[:, 0]), nll),
        **_with_ends("brier", _mean(saved[:, 1]), brier),
        "p": mcnemar(own.correct, others.correct).two_sided,
    }


def _gain_in_accuracy(name: str, one: Bools, other: Bools, confidence: float) -> dict[str, float]:
    won, lost = int((one & ~other).sum()), int((other & ~one).sum())
    ends = paired_interval(won, lost, len(one), confidence)
    return _with_ends(name, _mean(one) - _mean(other), Interval(*map(float, ends)))


def _with_ends(name: str, value: float, ends: Interval) -> dict[str, float]:
    return {name: value, f"{name}_low": ends.low, f"{name}_high": ends.high}


def _proportion(hits: int, n: int) -> float:
    return float(hits / n) if n else np.nan


def _mean(values: Float64 | Bools) -> float:
    return float(values.mean()) if len(values) else np.nan


def _worst_class(confusion: Int64, confidence: float) -> dict[str, float]:
    hits, support, worst = confusion.diagonal(), confusion.sum(axis=1), worst_class(confusion)
    recall = np.nan if worst is None else _proportion(int(hits[worst]), int(support[worst]))
    return _with_ends("worst_class_recall", recall, worst_interval(hits, support, confidence))


def wilson(hits: ArrayLike, n: ArrayLike, confidence: float) -> tuple[Float64, Float64]:
    """Score interval of a proportion (Wilson 1927), lower and upper ends; arrays give arrays. NaN where n is 0."""
    hits, n = np.asarray(hits, dtype=np.float64), np.asarray(n, dtype=np.float64)
    z = _normal_quantile(confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = hits / n
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and n hits the ends are exactly 0 and 1, which rounding would miss by a hair.
    low = np.where(hits == 0, 0 * share, middle - half)
    high = np.where(hits == n, 1 + 0 * share, middle + half)
    return low, high


def newcombe(
    hits: ArrayLike, n: ArrayLike, other_hits: ArrayLike, other_n: ArrayLike, confidence: float
) -> tuple[Float64, Float64]:
    """Of the difference of two proportions of different images (Newcombe 1998, method 10); arrays give arrays.

    NaN where there are no images on either side.
    """
    (low, high), (other_low, other_high) = wilson(hits, n, confidence), wilson(other_hits, other_n, confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.asarray(hits, dtype=np.float64) / np.asarray(n, dtype=np.float64)
        other = np.asarray(other_hits, dtype=np.float64) / np.asarray(other_n, dtype=np.float64)
    difference = share - other
    return difference - np.hypot(share - low, other_high - other), difference + np.hypot(
        high - share, other - other_low
    )


def effective_images(share: float, variance: float, images: float) -> float:
    """So many images would give a plain proportion this variance; at most `images`, and as many where nothing varies.

    The effective sample size of surveys (Korn and Graubard 1998; with Wilson's interval Dean and Pagano 2015). So a
    share that is no plain proportion has an interval that keeps to 0-1 and does not vanish where all are right.
    """
    return min(images, share * (1 - share) / variance) if variance > 0 and 0 < share < 1 else images


def balanced_accuracy_interval(confusion: Int64, confidence: float) -> Interval:
    """Of the mean recall of the classes that have images; NaN where none has.

    The recalls are independent proportions, so their variances r (1 - r) / (n - 1) add up. One image tells nothing of
    the spread in its class, which then counts as the largest that the mean recall allows.
    """
    support = confusion.sum(axis=1)
    recall = per_class(confusion).recall[support > 0]
    if not len(recall):
        return NOTHING
    n, mean = support[support > 0], float(recall.mean())
    spread = np.where(n > 1, recall * (1 - recall) / np.maximum(n - 1, 1), mean * (1 - mean))
    effective = effective_images(mean, float(spread.sum()) / len(recall) ** 2, float(n.sum()))
    return Interval(*map(float, wilson(mean * effective, effective, confidence)))


def selective_intervals(
    confident: Float64, correct: Bools, coverage: float, draws: int, seed: int, confidence: float
) -> tuple[Interval, Interval]:
    """Of AURC, and of the accuracy on the most confident share of the images; NaN of no images.

    AURC: BCa bootstrap. The accuracy: Wilson's interval of the images kept would be too narrow, since it is chance too
    which they are; so it is Wilson's with the variance that the bootstrap finds.

    Args:
        confident, correct: (N,) the confidence in each prediction, and whether it is right.
    """
    if not len(correct):
        return NOTHING, NOTHING
    areas, shares = bootstrap.selective_draws(confident, correct, coverage, draws, seed).T
    curve = selective_curve(confident, correct)
    influence = bootstrap.risk_coverage_influence(confident, correct)
    effective = effective_images(float(shares.mean()), float(shares.var()), coverage * len(correct))
    return (
        bootstrap.bca(areas, risk_coverage_area(curve), influence, confidence),
        Interval(*map(float, wilson(accuracy_at(curve, coverage) * effective, effective, confidence))),
    )


def worst_interval(hits: Int64, support: Int64, confidence: float) -> Interval:
    """Of the true share of the group that was picked for having the lowest one of all: a class or a slice.

    The lowest of many is low by bad luck too. The upper end allows for it: it is that of a Clopper-Pearson interval
    which holds for all groups at once (Šidák 1967), so it holds for whichever was picked. The lower end needs no
    correction: a group is hardly picked as the lowest in a draw that flatters it. Covers at least so often as it says,
    whatever the shares are; where all groups have as many images, so it does the lowest of all true shares.

    Args:
        hits, support: (G,) counts; groups without images are left out. NaN where none has any.
    """
    groups = np.flatnonzero(support)
    if not len(groups):
        return NOTHING
    worst = groups[np.argmin(hits[groups] / support[groups])]
    right, n = int(hits[worst]), int(support[worst])
    each = -np.expm1(np.log1p(-(1 - confidence) / 2) / len(groups))  # of the upper tail, for every group
    return Interval(clopper_pearson(right, n, confidence).low, clopper_pearson(right, n, 1 - 2 * each).high)


@dataclass(frozen=True)
class ClassIntervals:
    """(C,) each; NaN where the figure is not defined."""

    recall_low: Float64
    recall_high: Float64
    precision_low: Float64
    precision_high: Float64
    f1_low: Float64
    f1_high: Float64


def class_intervals(confusion: Int64, confidence: float) -> ClassIntervals:
    """Of recall, precision and F1 of every class, each for itself: of C of them some miss.

    Recall and precision are proportions: Wilson. F1 is 2 J / (1 + J) with J = TP / (TP + FP + FN), a proportion too
    once the images are given that are, or are taken for, the class. It grows with J, so its ends are those of J in the
    same formula ("Wilson indirect", Lam, Gopal and Qian 2023).
    """
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    low, high = wilson(hits, support + predicted - hits, confidence)
    return ClassIntervals(
        *wilson(hits, support, confidence),
        *wilson(hits, predicted, confidence),
        f1_low=2 * low / (1 + low),
        f1_high=2 * high / (1 + high),
    )


def calibration_interval(
    confident: Float64, correct: Bools, bins: int, draws: int, seed: int, confidence: float
) -> Interval:
    """Of the ECE that the model would show on endless images.

    ECE cannot be below 0, so few images push it up, and a resample of them pushes it up once more: the percentile
    bootstrap covers the truth of a well-calibrated model never (measured: 0 of 400). This is the reverse percentile
    bootstrap, 2 ECE - quantile, which takes that push off again; and where the data do not contradict a perfectly
    calibrated model (`calibration_noise`), the interval begins at 0. Measured coverage of 95 %: 87 to 98 %.

    Args:
        confident, correct: (N,) the confidence in each prediction, and whether it is right.
    """
    n = len(correct)
    if not n:
        return NOTHING
    gaps = (correct - confident)[:, None] * _one_hot(confident, bins)
    estimate = np.abs(gaps.sum(axis=0)).sum() / n
    errors = bootstrap.resampled(n, draws, seed, lambda counts: np.abs(counts @ gaps).sum(axis=1, keepdims=True) / n)
    low, high = bootstrap.percentiles(errors[:, 0], confidence)
    contradicted = estimate > np.quantile(_noise(confident, bins, draws, seed), (1 + confidence) / 2)
    return Interval(float(max(0, 2 * estimate - high)) if contradicted else 0.0, float(2 * estimate - low))


def calibration_noise(logits: Floats, bins: int, draws: int, seed: int) -> Float64:
    """ECE of a model that is right exactly as often as it says, drawn again and again on images like these: (draws,).

    Consistency resampling (Bröcker and Smith 2007): each prediction is right with the probability that it claims.
    """
    return _noise(confidences(logits), bins, draws, seed)


def _noise(confident: Float64, bins: int, draws: int, seed: int) -> Float64:
    n = len(confident)
    if not n:
        return np.full(draws, np.nan)
    member, rng = _one_hot(confident, bins), np.random.default_rng([seed, 1])
    claimed = confident @ member
    errors = [
        np.abs((rng.random((rows, n)) < confident) @ member - claimed).sum(axis=1)
        for rows in bootstrap.chunks(draws, n)
    ]
    return np.concatenate(errors) / n


def _one_hot(confident: Float64, bins: int) -> Float64:
    """(N, bins) 1 in the bin of each confidence, 0 elsewhere."""
    return (bin_indices(confident, bins)[:, None] == np.arange(bins)).astype(np.float64)


class McNemar(NamedTuple):
    """Two models on the same images. `won`: only the first is right; `lost`: only the second."""

    won: int
    lost: int
    better: float
    """One-sided p: how often two equally good models would give at least so many won."""
    worse: float
    """One-sided p of the other direction."""
    two_sided: float


def mcnemar(one: Bools, other: Bools) -> McNemar:
    """Exact McNemar test: where just one of two equal models is right, it is either with probability 1/2.

    Args:
        one, other: (N,) correct or not, of the same images in the same order.
    """
    won, lost = int((one & ~other).sum()), int((other & ~one).sum())
    better, worse = float(at_least(won, won + lost)), float(at_least(lost, won + lost))
    return McNemar(won, lost, better, worse, min(1.0, 2 * min(better, worse)))


def at_least(heads: ArrayLike, tosses: ArrayLike, chance: ArrayLike = 0.5) -> Float64:
    """Probability of at least so many heads of a coin; arrays give arrays.

    P(X >= k) of a binomial is the regularised incomplete beta function I_p(k, n - k + 1).
    """
    heads, tosses = np.asarray(heads, dtype=np.float64), np.asarray(tosses, dtype=np.float64)
    inside = np.clip(heads, 1, np.maximum(tosses, 1))
    chances = betainc(inside, np.maximum(tosses - inside, 0) + 1, chance)
    return np.where(heads <= 0, 1.0, np.where(heads > tosses, 0.0, chances))


SHARES = 33
"""Shares of discordant images at which `paired_p` looks for its largest value; 1,001 find less than 1 % more."""


@lru_cache(maxsize=4096)
def paired_p(won: int, lost: int, images: int, margin: float, level: float) -> float:
    """Exact one-sided p that the first model is better than the other by more than `margin`, on the same images.

    The null hypothesis: its accuracy is at most `margin` above the other's. 0 asks for *better*, a negative margin for
    *not worse by more*; with `won` and `lost` exchanged, a positive one asks whether it is *worse by more*.

    With a margin of 0 this is McNemar's test. Otherwise how often the two disagree matters, and nobody knows it. So
    outcomes are ranked by Tango's score (1998), the chance of one at least as extreme is summed up exactly over
    (won, lost), and the largest chance counts over all shares of discordant images that are plausible: a
    Clopper-Pearson interval, whose own error is added to p (Berger and Boos 1994). Valid for every number of images.

    Args:
        won, lost: images that only the first, and only the other, has right.
        margin: in -1 to 1, both excluded.
        level: at which p will be judged; a 500th of it is spent on the interval.

    Returns:
        p in 0-1; 1 where there is nothing to tell from.
    """
    if margin == 0 or not images:
        return float(at_least(won, won + lost))
    spent = level / 500
    low, high = clopper_pearson(won + lost, images, 1 - spent)
    low = max(low, abs(margin))  # with fewer, a difference of `margin` is not possible
    if low > high:
        return spent if margin < 0 else 1.0
    shares = np.linspace(low, high, SHARES)[:, None]
    reach = 9 * np.sqrt(images * shares * (1 - shares)) + 20  # beyond lies less than 1e-15
    first = max(0, int((images * shares - reach).min()))
    discordant = np.arange(first, min(images, int((images * shares + reach).max())) + 1)
    weights = np.diff(bdtr(np.arange(first - 1, discordant[-1] + 1).astype(np.float64), images, shares), axis=1)
    if not first:
        weights[:, 0] = bdtr(0.0, images, shares[:, 0])  # and not the difference to -1, which is NaN
    row, column = np.nonzero(weights > 1e-16)
    least = _least_won(discordant, images, margin, float(score(won, lost, images, margin)))
    won_by_chance = np.minimum(1, (1 + margin / shares[:, 0]) / 2)
    chances = at_least(least[column], discordant[column], won_by_chance[row])
    totals = np.bincount(row, chances * weights[row, column], minlength=SHARES)
    return float(min(1.0, totals.max() + spent))


def _least_won(discordant: Int64, images: int, margin: float, observed: float) -> Int64:
    """Of each number of discordant images, the least won whose score reaches `observed`; one more where none does."""
    below, reached = np.full(len(discordant), -1), discordant + 1
    while (reached - below > 1).any():
        middle = (below + reached) // 2
        enough = score(middle, discordant - middle, images, margin) >= observed - 1e-9
        below, reached = np.where(enough, below, middle), np.where(enough, middle, reached)
    return reached


def score(won: ArrayLike, lost: ArrayLike, images: ArrayLike, difference: ArrayLike) -> Float64:
    """How many standard errors the accuracies are apart beyond `difference` (Tango 1998); arrays give arrays.

    The error is that of two models which differ by just `difference` and resemble the data most otherwise.
    """
    won, lost = np.asarray(won, dtype=np.float64), np.asarray(lost, dtype=np.float64)
    images, difference = np.asarray(images, dtype=np.float64), np.asarray(difference, dtype=np.float64)
    half = won * (1 + difference) + lost * (1 - difference) - 2 * images * difference
    root = np.sqrt(np.maximum(0, half**2 + 8 * images * lost * difference * (1 - difference)))
    share_lost = np.maximum((half + root) / (4 * images), np.maximum(0, -difference))
    variance = images * (2 * share_lost + difference * (1 - difference))
    beyond = won - lost - images * difference
    return np.divide(beyond, np.sqrt(variance), out=np.zeros(np.shape(beyond)), where=variance > 0)


def paired_interval(won: ArrayLike, lost: ArrayLike, images: ArrayLike, confidence: float) -> tuple[Float64, Float64]:
    """Of accuracy(first) - accuracy(other) on the same images: every difference that Tango's score does not rule out.

    Arrays give arrays, lower and upper ends; NaN of no images.
    """
    images = np.asarray(images, dtype=np.float64)
    z, some = _normal_quantile(confidence), np.maximum(images, 1)
    ends = []
    for bound in (z, -z):
        low, high = np.full(images.shape, -1.0), np.full(images.shape, 1.0)
        for _ in range(40):
            middle = (low + high) / 2
            above = score(won, lost, some, middle) >= bound  # falls as the difference grows
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        ends.append(np.where(images > 0, (low + high) / 2, np.nan))
    return ends[0], ends[1]


def clopper_pearson(hits: int, n: int, confidence: float) -> Interval:
    """Exact interval of a proportion: covers it at least so often, whatever it is. 0 to 1 of nothing."""
    tail = (1 - confidence) / 2
    low = betaincinv(hits, n - hits + 1, tail) if hits else 0.0
    high = betaincinv(hits + 1, n - hits, 1 - tail) if hits < n else 1.0
    return Interval(float(low), float(high))


def holm(p_values: ArrayLike) -> Float64:
    """Adjusted p values (Holm 1979): all that are at most α are so with a joint error rate of α."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    steps = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1, steps)
    return adjusted


def _normal_quantile(confidence: float) -> float:
    return float(ndtri((1 + confidence) / 2))
