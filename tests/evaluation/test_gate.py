"""The gate is a test with a stated error rate; identical models never pass; a missing figure is a no."""

import json

import numpy as np
import pandas as pd
import pytest

from stages.evaluation.gate import Answers, Verdict, answers_of, judge
from stages.params.gate import Gate

PARAMS = Gate(min_top1=0.5, min_worst_class=0.2, max_ece=0.2, max_size_mb=100, alpha=0.05)
N = 700
LABELS = np.arange(N) % 6
KEYS = tuple(f"target/val/c/{i:04d}.JPEG" for i in range(N))


def _answers(correct: np.ndarray, name: str = "a") -> Answers:
    return Answers(name, KEYS, LABELS, correct)


def _judge(candidate: Answers, in_force: Answers | None = None, size: int = 1, **figures: float | None) -> Verdict:
    defaults: dict[str, float | None] = {
        "top1": float(candidate.correct.mean()), "worst_class_recall": 0.6, "ece": 0.05
    }  # fmt: skip
    return judge(candidate, defaults | figures, size, in_force, PARAMS)


RIGHT = np.arange(N) % 10 != 0
"""Nine in ten."""


def test_the_first_model_needs_only_the_floors() -> None:
    verdict = _judge(_answers(RIGHT))
    assert verdict.result == "passed"
    assert [condition.result for condition in verdict.conditions] == ["passed"] * 4
    assert verdict.in_force is None


@pytest.mark.parametrize(
    ("missed", "name"),
    [
        ({"worst_class_recall": 0.19}, "recall of the worst class"),
        ({"worst_class_recall": None}, "recall of the worst class"),
        ({"ece": 0.21}, "calibration error (ECE)"),
        ({"size": 100_000_001}, "size of the weights, MB"),
    ],
)
def test_a_missed_floor_or_a_missing_figure_fails(missed: dict[str, float], name: str) -> None:
    better = _judge(_answers(RIGHT), _answers(RIGHT & (np.arange(N) % 3 > 0), "b"), **missed)  # type: ignore[arg-type]
    assert better.result == "failed"
    assert [condition.name for condition in better.conditions if condition.result == "failed"] == [name]


def test_top1_below_its_floor_fails() -> None:
    assert _judge(_answers(np.arange(N) % 10 == 0)).result == "failed"


def test_identical_models_never_pass() -> None:
    verdict = _judge(_answers(RIGHT), _answers(RIGHT, "b"))
    assert verdict.result == "inconclusive"
    assert verdict.conditions[-1].figure == 1


@pytest.mark.parametrize(("won", "lost", "result"), [(20, 5, "passed"), (5, 20, "failed"), (14, 10, "inconclusive")])
def test_better_worse_and_neither(won: int, lost: int, result: str) -> None:
    old = RIGHT.copy()
    hits, misses = np.flatnonzero(RIGHT), np.flatnonzero(~RIGHT)
    new = old.copy()
    new[misses[:won]], new[hits[:lost]] = True, False
    verdict = _judge(_answers(new), _answers(old, "b"))
    assert verdict.result == result
    assert verdict.in_force == "b"
    assert f"{won} images right" in verdict.conditions[-1].detail


def test_another_test_set_cannot_be_compared() -> None:
    other = Answers("b", KEYS[:-1], LABELS[:-1], RIGHT[:-1] & False)
    verdict = _judge(_answers(RIGHT), other)
    assert verdict.result == "inconclusive"
    assert verdict.conditions[-1].detail.startswith("test set differs")
    relabelled = Answers("b", KEYS, (LABELS + 1) % 6, RIGHT & False)
    assert _judge(_answers(RIGHT), relabelled).result == "inconclusive"


def test_figures_of_another_evaluation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top-1 is 0\.95 in the metrics and 0\.9"):
        _judge(_answers(RIGHT), top1=0.95)


def test_equal_models_pass_at_most_as_often_as_alpha_and_better_ones_mostly() -> None:
    """Errors correlated as real models have them: 12 % of the images are answered differently right."""
    rng = np.random.default_rng(1)
    results = {"equal": [], "four points better": []}  # type: dict[str, list[str]]
    for name, gain in (("equal", 0.0), ("four points better", 0.04)):
        for _ in range(2000):
            chance = rng.random(N)
            one = (chance < 0.06 + gain / 2) | (chance > 0.2)
            other = ((chance >= 0.06 + gain / 2) & (chance < 0.12)) | (chance > 0.2)
            results[name].append(_judge(_answers(one), _answers(other, "b")).result)
    assert results["equal"].count("passed") / 2000 <= 0.05 + 0.01
    assert results["equal"].count("failed") / 2000 <= 0.05 + 0.01
    assert results["four points better"].count("passed") / 2000 >= 0.8
    assert results["four points better"].count("failed") == 0


def test_answers_are_paired_by_key_whatever_the_order() -> None:
    rows = pd.DataFrame(
        {
            "key": ["b", "a", "c"], "split": ["test", "test", "fresh"], "label": [1, 0, 0],
            "logits": [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]],
        }
    )  # fmt: skip
    answers = answers_of("x", rows)
    assert answers.keys == ("a", "b")
    assert answers.correct.tolist() == [False, True]
    with pytest.raises(ValueError, match="twice"):
        answers_of("x", pd.concat([rows, rows]))
    with pytest.raises(ValueError, match="no image of the split"):
        answers_of("x", rows[rows["split"] == "fresh"])


def test_a_verdict_is_json() -> None:
    verdict = _judge(_answers(RIGHT), _answers(RIGHT, "b"))
    plain = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert plain["result"] == "inconclusive"
    assert plain["in_force"] == "b"
    assert {"name", "figure", "bound", "result", "detail"} == set(plain["conditions"][0])
