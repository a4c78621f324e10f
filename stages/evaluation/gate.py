"""The gate: what a version must show before a person is asked. A pure function of figures and of paired answers.

Absolute floors first; then an exact McNemar test against the version in force on the same test images. It is a test
with a stated error rate and not `new >= old`: an equally good version passes with probability at most `alpha`, an
identical one never.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from stages.evaluation.intervals import McNemar, mcnemar
from stages.evaluation.metrics import Bools, Int64, predictions
from stages.params.gate import Gate

Result = Literal["passed", "failed", "inconclusive"]

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Answers:
    """What one version said to the test images, sorted by key."""

    sha256: str
    """Of the version's weights."""
    keys: tuple[str, ...]
    labels: Int64
    correct: Bools


@dataclass(frozen=True)
class Condition:
    """One line of the verdict: the figure is held against the bound."""

    name: str
    figure: float | None
    bound: float | None
    result: Result
    detail: str


@dataclass(frozen=True)
class Verdict:
    """`failed` where any condition failed, else `inconclusive` where any is, else `passed`."""

    result: Result
    conditions: tuple[Condition, ...]
    alpha: float
    candidate: str
    """sha256 of the weights judged."""
    in_force: str | None
    """sha256 of the weights it was held against: the verdict is stale once another version is in force."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `gate.json` holds them."""
        values = asdict(self)
        return {**values, "conditions": list(values["conditions"])}


def answers_of(sha256: str, predicted: pd.DataFrame) -> Answers:
    """A version's answers out of its reports/predictions.parquet (columns key, split, label, logits).

    Raises:
        ValueError: no row of the split `test`, or a key twice.
    """
    rows = predicted[predicted["split"] == "test"].sort_values("key")
    if rows.empty:
        raise ValueError("the predictions hold no image of the split `test`")
    if rows["key"].duplicated().any():
        raise ValueError(f"the predictions hold {rows['key'][rows['key'].duplicated()].iloc[0]} twice")
    labels = rows["label"].to_numpy(np.int64)
    correct = predictions(np.stack(rows["logits"].to_list())) == labels
    return Answers(sha256, tuple(rows["key"]), labels, correct)


def judge(
    candidate: Answers, figures: Mapping[str, float | None], size: int, in_force: Answers | None, params: Gate
) -> Verdict:
    """Whether a version may go before a person.

    Args:
        candidate: its answers to the test images.
        figures: `test` of its reports/metrics.json; read are `top1`, `worst_class_recall` and `ece`.
        size: bytes of its weights.
        in_force: the answers of the version in force; None where there is none, and the floors decide alone.

    Raises:
        ValueError: figures and answers are not of the same evaluation.
    """
    top1 = figures["top1"]
    if top1 is None or abs(top1 - candidate.correct.mean()) > 1e-4:
        raise ValueError(f"top-1 is {top1} in the metrics and {candidate.correct.mean():.6f} by the predictions")
    conditions = [
        _at_least("top-1", top1, params.min_top1),
        _at_least("recall of the worst class", figures["worst_class_recall"], params.min_worst_class),
        _at_most("calibration error (ECE)", figures["ece"], params.max_ece),
        _at_most("size of the weights, MB", size / MEGABYTE, params.max_size_mb),
    ]
    if in_force is not None:
        conditions.append(_better(candidate, in_force, params.alpha))
    return Verdict(
        result=_worst([condition.result for condition in conditions]),
        conditions=tuple(conditions),
        alpha=params.alpha,
        candidate=candidate.sha256,
        in_force=None if in_force is None else in_force.sha256,
    )


def _at_least(name: str, figure: float | None, bound: float) -> Condition:
    return _floor(name, figure, bound, figure is not None and figure >= bound, "at least")


def _at_most(name: str, figure: float | None, bound: float) -> Condition:
    return _floor(name, figure, bound, figure is not None and figure <= bound, "at most")


def _floor(name: str, figure: float | None, bound: float, held: bool, rule: str) -> Condition:
    # A figure that is missing is not a pass: nothing goes on that was not shown.
    shown = "not computed" if figure is None else f"{figure:.4g}"
    return Condition(name, figure, bound, "passed" if held else "failed", f"{shown}; {rule} {bound:g} is asked")


def _better(candidate: Answers, in_force: Answers, alpha: float) -> Condition:
    name = "better than the version in force"
    if candidate.keys != in_force.keys or not np.array_equal(candidate.labels, in_force.labels):
        detail = (
            f"test set differs: {len(candidate.keys)} images here, {len(in_force.keys)} for the version in force, "
            f"{len(set(candidate.keys) & set(in_force.keys))} in both; the two cannot be compared"
        )
        return Condition(name, None, alpha, "inconclusive", detail)
    test = mcnemar(candidate.correct, in_force.correct)
    return Condition(name, test.better, alpha, _direction(test, alpha), _in_words(test))


def _direction(test: McNemar, alpha: float) -> Result:
    if test.better <= alpha:
        return "passed"
    return "failed" if test.worse <= alpha else "inconclusive"


def _in_words(test: McNemar) -> str:
    return (
        f"{test.won} images right that it gets wrong, {test.lost} the other way round; "
        f"exact McNemar test, one-sided: p = {test.better:.3g} for better, {test.worse:.3g} for worse"
    )


def _worst(results: list[Result]) -> Result:
    order: tuple[Result, ...] = ("failed", "inconclusive", "passed")
    return next(result for result in order if result in results)
