"""The gate: what a version must show before a person decides. A pure function of figures and paired predictions.

First absolute floors. Then three exact tests against the version in force, image by image: not inferior on `test` by
more than a margin; better on `test` or on the pooled `fresh` images; no class and no batch significantly worse. A
version that is better nowhere passes with probability at most `alpha`, an identical one never. A version that is worse
on `test` by the whole margin but better on `fresh` passes with probability at most `alpha_inferior`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, isfinite
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import ndtri

from stages.evaluation.metrics import Bools
from stages.evaluation.predictions import VersionPredictions
from stages.evaluation.statistics.intervals import holm, paired_interval, paired_p
from stages.params.gate import Gate

Outcome = Literal["passed", "failed", "inconclusive"]
Kind = Literal["test", "fresh", "class", "batch"]

MEGABYTE = 1_000_000
SIZE = "size of the weights, MB"
MOST_NAMED = 3
"""Classes and batches that a condition names."""
MOST_CHARACTERS = 40
"""Of a name in a condition."""


@dataclass(frozen=True)
class Condition:
    """One line of the verdict: the figure is compared with the bound."""

    name: str
    figure: float | None
    bound: float | None
    result: Outcome
    detail: str


@dataclass(frozen=True)
class Comparison:
    """Candidate and version in force on some images that both predicted."""

    kind: Kind
    """All of `test`, all of `fresh`, a class of `test`, or one batch of `fresh`."""
    name: str
    images: int
    now: int
    """Images that the candidate has right."""
    before: int
    """Images that the version in force has right."""
    won: int
    """Images that only the candidate has right."""
    worse: float | None
    """p that the candidate is worse by more than the margin, adjusted for all comparisons tested; None: not tested."""

    @property
    def lost(self) -> int:
        """Images that only the version in force has right."""
        return self.won - self.now + self.before

    @property
    def difference(self) -> float:
        """Accuracy of the candidate less that of the version in force; 0 without images."""
        return (self.now - self.before) / self.images if self.images else 0.0


@dataclass(frozen=True)
class Verdict:
    """`failed` where any condition failed, else `inconclusive` where any is, else `passed`."""

    result: Outcome
    conditions: tuple[Condition, ...]
    comparisons: tuple[Comparison, ...]
    """`test`, `fresh`, then classes of test and batches of fresh; none where nothing could be compared."""
    alpha: float
    margin: float
    min_n: int
    candidate: str
    """sha256 of the weights judged."""
    in_force: str | None
    """sha256 of the weights compared with: the verdict is stale once another version is in force."""
    test_set: str
    """The digest of the test images and their labels."""
    decisions: int
    """How many decisions were taken on this test set, this one included."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `gate.json` holds them."""
        values = asdict(self)
        return {**values, "conditions": list(values["conditions"]), "comparisons": list(values["comparisons"])}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Verdict":
        """The verdict that `to_dict` wrote.

        Raises:
            KeyError, TypeError: it is not of this form.
        """
        conditions = tuple(Condition(**each) for each in values["conditions"])
        comparisons = tuple(Comparison(**each) for each in values["comparisons"])
        return Verdict(**{**values, "conditions": conditions, "comparisons": comparisons})


def test_set(predictions: VersionPredictions) -> str:
    """Digest of the test images and their labels: verdicts with the same one were taken on the same test set."""
    images = zip(predictions.keys, predictions.labels.tolist(), predictions.test.tolist(), strict=True)
    lines = "".join(f"{key}\0{label}\n" for key, label, of_test in images if of_test)
    return hashlib.sha256(lines.encode()).hexdigest()


def judge(
    candidate: VersionPredictions,
    figures: Mapping[str, float | None],
    size_bytes: int,
    latency_ms: float | None,
    in_force: VersionPredictions | None,
    params: Gate,
    decisions: int = 1,
    classes: Sequence[str] = (),
) -> Verdict:
    """Whether a version may go before a person.

    Args:
        candidate: its predictions on `test` and `fresh`.
        figures: `test` of its reports/metrics.json; read are `top1`, `worst_class_recall` and `ece`.
        size_bytes: of its weights.
        latency_ms: of one image, median.
        in_force: those of the version in force; None: there is none, and the floors decide alone.
        decisions: taken on this test set so far, this one included.
        classes: names by label.

    Raises:
        ValueError: figures and predictions are not of the same evaluation.
    """
    right, top1 = float(candidate.correct[candidate.test].mean()), _number(figures.get("top1"))
    if top1 is None or abs(top1 - right) > 1e-4:
        raise ValueError(f"top-1 is {top1} in the metrics and {right:.6f} by the predictions")
    conditions = [
        _at_least("top-1", top1, params.min_top1),
        _worst_class(figures.get("worst_class_recall"), params.min_worst_class, _untested(candidate, classes)),
        _at_most("calibration error (ECE)", figures.get("ece"), params.max_ece),
        _at_most(SIZE, size_bytes / MEGABYTE, params.max_size_mb),
        _at_most("latency of one image, ms", latency_ms, params.max_latency_ms),
    ]
    comparisons: list[Comparison] = []
    if in_force is not None:
        if differs := _test_sets_differ(candidate, in_force):
            conditions.append(Condition(NOT_INFERIOR, None, params.alpha_inferior, "inconclusive", differs))
        else:
            comparisons = _comparisons(candidate, in_force, params, classes)
            conditions += _compared(comparisons, int((~candidate.test).sum()), params)
    return Verdict(
        result=_worst([condition.result for condition in conditions]),
        conditions=tuple(conditions),
        comparisons=tuple(comparisons),
        alpha=params.alpha,
        margin=params.margin,
        min_n=params.min_n,
        candidate=candidate.sha256,
        in_force=None if in_force is None else in_force.sha256,
        test_set=test_set(candidate),
        decisions=decisions,
    )


# ---------------------------------------------------------------------------------------------------------- floors


def _at_least(name: str, figure: float | None, bound: float) -> Condition:
    return _floor(name, _number(figure), bound, 1, "at least")


def _worst_class(figure: float | None, bound: float, untested: list[str]) -> Condition:
    floor = _at_least("recall of the worst class", figure, bound)
    if not untested:
        return floor
    more = f" and {len(untested) - MOST_NAMED:,} more" if len(untested) > MOST_NAMED else ""
    named = ", ".join(map(_short, untested[:MOST_NAMED])) + more
    return replace(floor, detail=f"{floor.detail}; not judged, as test has no image of them: {named}")


def _untested(candidate: VersionPredictions, classes: Sequence[str]) -> list[str]:
    """Classes without a test image."""
    tested = set(candidate.labels[candidate.test].tolist())
    return [name for label, name in enumerate(classes) if label not in tested]


def _at_most(name: str, figure: float | None, bound: float) -> Condition:
    return _floor(name, _number(figure), bound, -1, "at most")


def _floor(name: str, figure: float | None, bound: float, sign: int, rule: str) -> Condition:
    # A figure that is missing is not a pass: nothing goes on that was not shown.
    held = figure is not None and sign * figure >= sign * bound
    shown = "not computed" if figure is None else f"{figure:.4g}"
    return Condition(name, figure, bound, "passed" if held else "failed", f"{shown}; {rule} {bound:g} is asked")


def _number(figure: float | None) -> float | None:
    """None where it is not one: gate.json knows no NaN."""
    return float(figure) if figure is not None and isfinite(figure) else None


# ------------------------------------------------------------------------------------------------------ comparison


def _test_sets_differ(candidate: VersionPredictions, in_force: VersionPredictions) -> str:
    """Why the two cannot be compared; empty where they predicted the same test images with the same labels."""
    if _same_images(candidate, in_force):
        return ""
    here, there = (
        dict(zip(np.array(each.keys)[each.test], each.labels[each.test].tolist(), strict=True))
        for each in (candidate, in_force)
    )
    if here == there:
        return ""
    both = here.keys() & there.keys()
    relabelled = sum(here[key] != there[key] for key in both)
    return (
        f"test set differs: {len(here):,} images here, {len(there):,} for the version in force, {len(both):,} in both"
        f"{f', {relabelled:,} of them with another label' if relabelled else ''}; the two cannot be compared"
    )


def _same_images(one: VersionPredictions, other: VersionPredictions) -> bool:
    return (
        one.keys == other.keys and np.array_equal(one.split, other.split) and np.array_equal(one.labels, other.labels)
    )


def _comparisons(
    candidate: VersionPredictions, in_force: VersionPredictions, params: Gate, classes: Sequence[str]
) -> list[Comparison]:
    """All of `test`, all of `fresh`, each class of `test`, each batch of `fresh`: on images that both predicted."""
    there = (
        np.arange(len(candidate.keys))
        if candidate.keys == in_force.keys
        else pd.Index(in_force.keys).get_indexer(pd.Index(candidate.keys))
    )
    same = (there >= 0) & (in_force.labels[there] == candidate.labels)
    now, before = candidate.correct, in_force.correct[there]
    test, fresh = same & candidate.test, same & ~candidate.test
    labels = np.where(candidate.test, candidate.labels, -1)
    slices: list[tuple[Kind, str, Bools]] = [
        ("class", classes[label] if label < len(classes) else f"class {label}", test & (labels == label))
        for label in np.unique(labels[test]).tolist()
    ]
    slices += [
        ("batch", name, fresh & (candidate.batch == name)) for name in np.unique(candidate.batch[fresh]).tolist()
    ]
    counted = [(kind, name, *_counted(now[rows], before[rows])) for kind, name, rows in slices]
    worse = _worse([counts for _, _, *counts in counted], params)
    return [
        Comparison("test", "test", *_counted(now[test], before[test]), None),
        Comparison("fresh", "fresh", *_counted(now[fresh], before[fresh]), None),
        *(Comparison(*counts, p) for counts, p in zip(counted, worse, strict=True)),
    ]


def _counted(now: Bools, before: Bools) -> tuple[int, int, int, int]:
    """Images, right now, right before, right only now."""
    return len(now), int(now.sum()), int(before.sum()), int((now & ~before).sum())


def _worse(counts: Sequence[Sequence[int]], params: Gate) -> list[float | None]:
    """p of being worse by more than the margin, of each comparison with enough images, adjusted for all of these."""
    judged = [i for i, (images, *_) in enumerate(counts) if images >= params.min_n]
    p_values: list[float] = []
    for i in judged:
        images, now, before, won = counts[i]
        # Without a loss beyond the margin p is near 1 anyway; not computing it saves thousands of classes the test.
        beyond_margin = before - now > params.margin * images
        level = params.alpha / len(judged)
        p_values.append(paired_p(won - now + before, won, images, params.margin, level) if beyond_margin else 1.0)
    adjusted: list[float | None] = [None] * len(counts)
    for i, p in zip(judged, holm(p_values).tolist(), strict=True):
        adjusted[i] = p
    return adjusted


# ------------------------------------------------------------------------------------------- conditions on the two

NOT_INFERIOR = "not inferior on test"


def _compared(comparisons: Sequence[Comparison], of_fresh: int, params: Gate) -> list[Condition]:
    test, fresh, *slices = comparisons
    return [_not_inferior(test, params), _better(test, fresh, of_fresh, params.alpha), _no_slice_worse(slices, params)]


def _not_inferior(test: Comparison, params: Gate) -> Condition:
    """Passed if "worse by more than the margin" is rejected, failed if it is significant, else inconclusive."""
    margin, level = params.margin, params.alpha_inferior
    shown = paired_p(test.won, test.lost, test.images, -margin, level)
    violated = paired_p(test.lost, test.won, test.images, margin, params.alpha)
    low, _ = paired_interval(test.won, test.lost, test.images, 1 - 2 * level)
    detail = f"{_points(test.difference)}, with {100 * (1 - level):g} % confidence at least {100 * float(low):+.1f}; "
    detail += f"{100 * margin:g} below is allowed; p = {shown:.2g}"
    if shown <= level:
        return Condition(NOT_INFERIOR, shown, level, "passed", detail)
    if violated <= params.alpha:
        return Condition(NOT_INFERIOR, shown, level, "failed", f"{detail}, and of the contrary {violated:.2g}")
    return Condition(NOT_INFERIOR, shown, level, "inconclusive", detail + _images_needed(test, params))


def _images_needed(test: Comparison, params: Gate) -> str:
    """How many test images would be enough; empty where there are enough."""
    if not params.margin or not test.images:
        return ""
    share = (test.won + test.lost) / test.images
    z = ndtri(1 - params.alpha_inferior) + ndtri(0.8)
    needed = ceil(z**2 * share / params.margin**2 / 100) * 100
    if needed <= test.images:
        return ""
    return (
        f". {test.images:,} images seldom show it of an equally good version: about {needed:,} would in 8 of 10 cases"
    )


def _better(test: Comparison, fresh: Comparison, of_fresh: int, alpha: float) -> Condition:
    """Exact McNemar tests on test and, where both predicted fresh images, on fresh; Holm over the two.

    `of_fresh` is the number of fresh images that the candidate predicted.
    """
    tested = [test, fresh] if fresh.images else [test]
    p_values = [_mcnemar(each) for each in tested]
    adjusted = holm(p_values)
    parts = [
        f"{each.name}: {each.won:,} images gained, {each.lost:,} lost, p = {p:.2g}"
        + (f" (Holm {a:.2g})" if len(tested) > 1 else "")
        for each, p, a in zip(tested, p_values, adjusted.tolist(), strict=True)
    ]
    if not of_fresh:
        parts.append("there are no fresh images")
    elif fresh.images < of_fresh:
        answered = f"{fresh.images:,} were" if fresh.images else "none was"
        parts.append(f"of {of_fresh:,} fresh images {answered} answered by both")
    smallest = float(adjusted.min())
    passed: Outcome = "passed" if smallest <= alpha else "inconclusive"
    return Condition("better on test or on fresh", smallest, alpha, passed, "; ".join(parts))


def _mcnemar(each: Comparison) -> float:
    return paired_p(each.won, each.lost, each.images, 0, 1)


def _no_slice_worse(slices: Sequence[Comparison], params: Gate) -> Condition:
    """Failed if any is significantly worse by more than the margin, with a joint error rate of alpha."""
    name = "no class or slice worse"
    judged = [each for each in slices if each.worse is not None]
    count = f"{len(judged):,} judged" + (
        f", {len(slices) - len(judged):,} of fewer than {params.min_n:,} images only shown"
        if len(judged) < len(slices)
        else ""
    )
    if not judged:
        return Condition(name, None, params.alpha, "passed", count)
    ranked = sorted(judged, key=lambda each: (each.worse or 0.0, each.difference, each.name))
    guilty = [each for each in ranked if (each.worse or 0.0) <= params.alpha]
    smallest = ranked[0].worse
    if not guilty:
        lowest = min(judged, key=lambda each: (each.difference, each.name))
        return Condition(name, smallest, params.alpha, "passed", f"{count}; the lowest is {_in_words(lowest)}")
    more = f" and {len(guilty) - MOST_NAMED:,} more" if len(guilty) > MOST_NAMED else ""
    named = "; ".join(_in_words(each) for each in guilty[:MOST_NAMED])
    beyond = f"significantly worse by more than {100 * params.margin:g}"
    return Condition(name, smallest, params.alpha, "failed", f"{count}; {beyond}: {named}{more}")


def _in_words(each: Comparison) -> str:
    of = f"fresh of {_short(each.name)}" if each.kind == "batch" else _short(each.name)
    return f"{of} {_points(each.difference)} on {each.images:,} images (p = {each.worse:.2g})"


def _short(name: str) -> str:
    return name if len(name) <= MOST_CHARACTERS else name[: MOST_CHARACTERS - 1] + "…"


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"


def _worst(results: list[Outcome]) -> Outcome:
    order: tuple[Outcome, ...] = ("failed", "inconclusive", "passed")
    return next(result for result in order if result in results)
