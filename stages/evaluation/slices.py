"""Slices: where the model is weaker than on the rest, by delivery, by what images are like, and by either in a class.

A model inherits what its training images had in common: a class seen only in daylight is known only in daylight. So
accuracy is held against that of all other images, slice by slice, and within each class against that of its own
others, since a hard class says nothing about light. Every slice that is looked at is paid for (Holm 1979).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from stages.evaluation.intervals import holm, wilson
from stages.evaluation.metrics import Bools, Float64, Int64

BINS = 4
"""Of each attribute, with equally many images."""
LEAST = 10
"""Images of the smallest slice that is looked at, and of the rest that it is held against: fewer tell nothing."""
RARE = 0.5
"""Of the median class's training images: a class with fewer is rare; frequent is one with its double."""


@dataclass(frozen=True)
class Slice:
    """Accuracy of some images beside that of the others. Shares are 0-1."""

    attribute: str
    value: str
    within: str
    """The class that slice and rest belong to; empty: all classes."""
    images: int
    top1: float
    low: float
    high: float
    rest: float
    """Top-1 of the other images."""
    gap: float
    """top1 - rest."""
    gap_low: float
    gap_high: float
    p: float
    """Adjusted for all slices that were looked at; one-sided."""


def slices(
    facts: pd.DataFrame, correct: Bools, labels: Int64, classes: Sequence[str], per_class: Int64, confidence: float
) -> list[Slice]:
    """All slices looked at: those significantly below the rest first, of them those whose gap is surely the largest.

    Args:
        facts: rows of data/accepted, one of each scored image, in their order.
        correct: (N,) whether the answer is right.
        labels: (N,).
        per_class: (C,) training images of each class.
        confidence: of intervals; a slice is significantly below where its adjusted p is under half of what this lacks
            to 1, since only one side counts.
    """
    members = _members(facts, labels, per_class)
    found = [
        _Counts(name, value, "", inside, ~inside)
        for name, by_value in members.items()
        for value, inside in by_value.items()
    ]
    for label, within in enumerate(classes):
        own = labels == label
        found += [
            _Counts(name, value, within, inside & own, ~inside & own)
            for name, by_value in members.items()
            if name != FREQUENCY
            for value, inside in by_value.items()
        ]
    looked_at = [each for each in found if each.inside.sum() >= LEAST and each.outside.sum() >= LEAST]
    rows = _tested(looked_at, correct, confidence)
    level = (1 - confidence) / 2
    return sorted(rows, key=lambda each: (each.p > level, each.gap_high if each.p <= level else each.p, each.gap))


def below(rows: Sequence[Slice], confidence: float) -> list[Slice]:
    """Those significantly below the rest."""
    return [each for each in rows if each.p <= (1 - confidence) / 2]


@dataclass(frozen=True)
class _Counts:
    attribute: str
    value: str
    within: str
    inside: Bools
    outside: Bools


def _tested(found: Sequence[_Counts], correct: Bools, confidence: float) -> list[Slice]:
    """With Wilson's intervals, Newcombe's of the difference (1998, method 10), and Fisher's exact test."""
    images, others = (np.array([getattr(each, side).sum() for each in found], np.int64) for side in SIDES)
    hits, other_hits = (np.array([(getattr(each, side) & correct).sum() for each in found], np.int64) for side in SIDES)
    top1, rest = hits / images, other_hits / others
    low, high = wilson(hits, images, confidence)
    rest_low, rest_high = wilson(other_hits, others, confidence)
    gap_low = top1 - rest - np.hypot(top1 - low, rest_high - rest)
    gap_high = top1 - rest + np.hypot(high - top1, rest - rest_low)
    p = holm(hypergeom.cdf(hits, images + others, hits + other_hits, images))
    columns = zip(images, top1, low, high, rest, top1 - rest, gap_low, gap_high, p, strict=True)
    return [
        Slice(each.attribute, each.value, each.within, int(count), *map(float, figures))
        for each, (count, *figures) in zip(found, columns, strict=True)
    ]


SIDES = ("inside", "outside")
FREQUENCY = "class frequency"


def _members(facts: pd.DataFrame, labels: Int64, per_class: Int64) -> dict[str, dict[str, Bools]]:
    """Which images belong to which value of which attribute; attributes of one value alone are left out."""
    width, height = (facts[side].to_numpy(np.float64) for side in ("width", "height"))
    measured: dict[str, tuple[Float64, str]] = {
        "size": (np.sqrt(width * height), "px"),
        "aspect ratio": (np.maximum(width, height) / np.minimum(width, height), ""),
        "brightness": (facts["brightness"].to_numpy(np.float64), "of 255"),
        "contrast": (facts["contrast"].to_numpy(np.float64), "of 255"),
        # The facts hold no tables of quantisation; this is what they do to a file.
        "compression": (8 * facts["bytes"].to_numpy(np.float64) / (width * height), "bit a pixel"),
    }
    members = {name: dict(_quarters(values, unit)) for name, (values, unit) in measured.items()}
    delivered = facts["batch"].where(facts["split"] == "test", facts["batch"] + " (fresh)")
    for name, values in (("batch", delivered), ("format", facts["format"]), ("colour mode", facts["mode"])):
        members[name] = {value: (values == value).to_numpy() for value in sorted(values.unique())}
    usual = float(np.median(per_class))
    share = per_class[labels] / max(usual, 1)
    members[FREQUENCY] = {
        f"rare (under {RARE:.0%} of the median class)": share < RARE,
        "usual": (share >= RARE) & (share <= 1 / RARE),
        f"frequent (over {1 / RARE:.0%} of it)": share > 1 / RARE,
    }
    return {name: by_value for name, by_value in members.items() if sum(each.any() for each in by_value.values()) > 1}


def _quarters(values: Float64, unit: str) -> Iterator[tuple[str, Bools]]:
    """Bins of about equally many images, fewer where many have the same value; each open below, the first closed."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1))) if len(values) else np.empty(0)
    if len(edges) < 2:
        return
    index = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)
    for number, (low, high) in enumerate(pairwise(edges)):
        yield f"{low:.3g} to {high:.3g} {unit}".strip(), index == number


def figures(rows: Sequence[Slice], confidence: float) -> Mapping[str, float]:
    """What reports/metrics.json holds of them; the worst is the one that is named first, NaN where none is below."""
    weak = below(rows, confidence)
    worst = weak[0] if weak else None
    return {
        "looked_at": len(rows),
        "below": len(weak),
        "worst_top1": worst.top1 if worst else np.nan,
        "worst_gap": worst.gap if worst else np.nan,
    }
