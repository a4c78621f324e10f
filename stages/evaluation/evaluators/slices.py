"""Slices: where the model is weaker than on the rest, by delivery and by attributes of images, overall and per class.

A model inherits what its training images have in common: a class seen only in daylight is known only in daylight. So
the accuracy of each slice is compared with that of all other images; within a class, with that of the class's other
images, since a hard class says nothing about light. All slices tested are corrected for, in p values (Holm 1979) and in
intervals (Bonferroni), so the statement about the worst one is valid although it was picked.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.metrics import Bools, Float64, Int64
from stages.evaluation.statistics.intervals import holm, newcombe, wilson
from stages.runtime import layout

name = "slices"

MOST_SHOWN, FEW_SHOWN = 20, 5
"""Slices in the report and in reports/plots/slices.csv; the report shows few where none is below the rest."""
BINS = 4
"""Bins of each attribute, with equally many images."""
LEAST = 10
"""Fewest images of a slice that is tested, and of its rest: fewer say nothing."""
RARE = 0.5
"""Share of the median class's training images: a class with less is rare; above 1 / RARE it is frequent."""
FREQUENCY = "class frequency"
MOST_DIGITS = 9


@dataclass(frozen=True)
class Slice:
    """Accuracy of a slice and of the other images. Shares are 0-1; intervals hold for all slices at once."""

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
    """Adjusted; one-sided."""

    @property
    def name(self) -> str:
        """In one line."""
        return f"{self.attribute} {self.value}" + (f", {self.within}" if self.within else "")


@dataclass(frozen=True)
class _Attribute:
    """A partition of the images: names of its parts, and the part of each image, (N,)."""

    name: str
    values: Sequence[str]
    index: Int64


def measure(inputs: EvaluationInputs) -> Result:
    """`slices`: how many were tested, how many are below the rest, and the figures of the first one.

    Over test and fresh images together.
    """
    both, settings = (inputs.test, inputs.fresh), inputs.settings
    keys = [key for split in both for key in split.samples.key]
    columns = ["key", "batch", "split", "width", "height", "bytes", "brightness", "contrast", "format", "mode"]
    files = sorted((layout.ACCEPTED / "finetune").glob("*.parquet"))
    facts = pd.concat([pd.read_parquet(path, columns=columns) for path in files]).set_index("key").loc[keys]
    labels = np.concatenate([split.labels for split in both])
    correct = np.concatenate([split.scores.correct for split in both])
    per_class = np.bincount(inputs.train.label, minlength=len(inputs.classes))
    found = slices(facts, correct, labels, inputs.classes, per_class, settings.confidence)
    weak = below(found, settings.confidence)
    values = {
        "slices": found,
        "weak": weak,
        "shown_slices": weak[:MOST_SHOWN] or found[:FEW_SHOWN],
        "error_rate": error_rate(settings.confidence),
    }
    table = pd.DataFrame(
        [{"slice": row.name} | vars(row) for row in found[:MOST_SHOWN]],
        columns=["slice", *(column.name for column in fields(Slice))],
    )
    section = ReportSection(Path(__file__).with_suffix(".html.j2"), values)
    return Result(section, {name: figures(found, settings.confidence)}, {name: table})


def slices(
    facts: pd.DataFrame, correct: Bools, labels: Int64, classes: Sequence[str], per_class: Int64, confidence: float
) -> list[Slice]:
    """All slices tested: those below the rest first, by the near end of their gap's interval.

    Args:
        facts: rows of data/accepted, one of each scored image, in their order.
        correct: (N,) whether the answer is right.
        labels: (N,).
        per_class: (C,) training images of each class.
        confidence: joint, of all intervals.
    """
    found: list[tuple[str, str, str]] = []
    counts: list[Int64] = []
    for attribute in _attributes(facts, labels, per_class):
        images, right = _tables(attribute, correct, labels, len(classes))
        total, total_right = images.sum(axis=0), right.sum(axis=0)
        for part in range(len(attribute.values)):
            found.append((attribute.name, attribute.values[part], ""))
            counts.append(np.array([total[part], total.sum(), total_right[part], total_right.sum()]))
        of_class, of_class_right = images.sum(axis=1), right.sum(axis=1)
        for label, part in np.argwhere(images) if attribute.name != FREQUENCY else ():
            found.append((attribute.name, attribute.values[part], classes[label]))
            counts.append(np.array([images[label, part], of_class[label], right[label, part], of_class_right[label]]))
    inside, both, right_inside, right_both = np.array(counts, np.int64).reshape(-1, 4).T
    kept = np.flatnonzero((inside >= LEAST) & (both - inside >= LEAST))
    rows = _tested([found[i] for i in kept], inside[kept], both[kept], right_inside[kept], right_both[kept], confidence)
    level = error_rate(confidence)
    return sorted(rows, key=lambda each: (each.p > level, each.gap_high if each.p <= level else each.p, each.gap))


def error_rate(confidence: float) -> float:
    """A slice is below the rest if its adjusted p is at most this: (1 - confidence) / 2, one side."""
    return (1 - confidence) / 2


def below(rows: Sequence[Slice], confidence: float) -> list[Slice]:
    """Those significantly below the rest."""
    return [each for each in rows if each.p <= error_rate(confidence)]


def figures(rows: Sequence[Slice], confidence: float) -> Mapping[str, float]:
    """How many slices there are, how many are below the rest, and the first one; NaN without any."""
    first = rows[0] if rows else None
    found: dict[str, float] = {"looked_at": len(rows), "below": len(below(rows, confidence))}
    names = ("top1", "low", "high", "gap", "gap_low", "gap_high", "p")
    return found | {f"worst_{name}": getattr(first, name) if first else np.nan for name in names}


def _tables(attribute: _Attribute, correct: Bools, labels: Int64, classes: int) -> tuple[Int64, Int64]:
    """Images and correct predictions of each class and part, (C, parts) each."""
    parts = len(attribute.values)
    cell = labels * parts + attribute.index
    images = np.bincount(cell, minlength=classes * parts).reshape(classes, parts)
    right = np.bincount(cell[correct], minlength=classes * parts).reshape(classes, parts)
    return images.astype(np.int64), right.astype(np.int64)


def _tested(
    names: Sequence[tuple[str, str, str]],
    images: Int64,
    both: Int64,
    right: Int64,
    right_both: Int64,
    confidence: float,
) -> list[Slice]:
    """With Wilson's intervals, Newcombe's of the difference, and Fisher's exact test."""
    others, other_right = both - images, right_both - right
    joint = 1 - (1 - confidence) / max(len(names), 1)
    low, high = wilson(right, images, joint)
    top1, rest = right / images, other_right / others
    gap_low, gap_high = newcombe(right, images, other_right, others, joint)
    p = holm(hypergeom.cdf(right, both, right_both, images))
    columns = zip(images, top1, low, high, rest, top1 - rest, gap_low, gap_high, p, strict=True)
    return [
        Slice(*each, int(count), *map(float, shares)) for each, (count, *shares) in zip(names, columns, strict=True)
    ]


def _attributes(facts: pd.DataFrame, labels: Int64, per_class: Int64) -> Iterator[_Attribute]:
    """The attributes in which the images differ."""
    width, height = (facts[side].to_numpy(np.float64) for side in ("width", "height"))
    measured: dict[str, tuple[Float64, str]] = {
        "size": (np.sqrt(width * height), "px"),
        "aspect ratio": (np.maximum(width, height) / np.minimum(width, height), ""),
        "brightness": (facts["brightness"].to_numpy(np.float64), "of 255"),
        "contrast": (facts["contrast"].to_numpy(np.float64), "of 255"),
        # The facts hold no quantisation tables; this is their effect on a file.
        "compression": (8 * facts["bytes"].to_numpy(np.float64) / (width * height), "bit a pixel"),
    }
    for name, (values, unit) in measured.items():
        yield from _quarters(name, values, unit)
    delivered = facts["batch"].where(facts["split"] == "test", facts["batch"] + " (fresh)")
    for name, kinds in (("batch", delivered), ("format", facts["format"]), ("colour mode", facts["mode"])):
        present, index = np.unique(kinds.to_numpy(dtype=object).astype(str), return_inverse=True)
        if len(present) > 1:
            yield _Attribute(name, [str(each) for each in present], index.astype(np.int64))
    share = per_class[labels] / max(float(np.median(per_class)), 1)
    index = np.where(share < RARE, 0, np.where(share > 1 / RARE, 2, 1))
    if len(np.unique(index)) > 1:
        named = (f"rare (under {RARE:.0%} of the median class)", "usual", f"frequent (over {1 / RARE:.0%} of it)")
        yield _Attribute(FREQUENCY, named, index.astype(np.int64))


def _quarters(name: str, values: Float64, unit: str) -> Iterator[_Attribute]:
    """Up to four parts of about equally many images; each open below, the first closed."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1))) if len(values) else np.empty(0)
    if len(edges) < 3 or not np.isfinite(edges).all():
        return
    index = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)
    shown = _distinct(edges)
    parts = [f"{low} to {high} {unit}".strip() for low, high in pairwise(shown)]
    yield _Attribute(name, parts, index.astype(np.int64))


def _distinct(edges: Float64) -> list[str]:
    """Numbers with the fewest digits that keep them distinct, at least three."""
    for digits in range(3, MOST_DIGITS):
        shown = [np.format_float_positional(each, digits, unique=False, fractional=False, trim="-") for each in edges]
        if len(set(shown)) == len(shown):
            break
    return shown
