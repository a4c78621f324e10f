"""The measurement of coverage: its truth is the truth, all is measured, and an interval that lies is found out."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss

from bench import coverage
from bench.coverage import MODELS, contradicted, covered, main, measured, population, table
from stages.evaluation import metrics
from stages.evaluation.statistics import intervals


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "IMAGES", 20_000)


def test_the_truth_is_that_of_the_whole_population() -> None:
    of = population(MODELS[1], 10)
    predicted, chances = of.one.argmax(axis=1), np.exp(metrics.log_probabilities(of.one))
    assert of.truth["top1"] == pytest.approx(accuracy_score(of.labels, predicted))
    assert of.truth["macro_f1"] == pytest.approx(f1_score(of.labels, predicted, average="macro"))
    assert of.truth["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(of.labels, predicted))
    assert of.truth["nll"] == pytest.approx(log_loss(of.labels, chances), rel=1e-5)
    other = np.exp(metrics.log_probabilities(of.other))
    assert of.truth["gain nll"] == pytest.approx(log_loss(of.labels, other) - of.truth["nll"], rel=1e-4)
    assert of.truth["gain top1"] == pytest.approx(of.truth["top1"] - accuracy_score(of.labels, of.other.argmax(axis=1)))


def test_the_models_are_what_they_are_called() -> None:
    truths = [population(model, 10).truth for model in MODELS]
    assert [each["top1"] for each in truths] == sorted(each["top1"] for each in truths)
    assert truths[1]["ece"] > 2 * truths[0]["ece"]  # too sure
    assert all(each["gain top1"] > 0 for each in truths)


def test_every_interval_that_is_stated_is_measured() -> None:
    of = population(MODELS[1], 10)
    held, errors = covered(of, 100, 1)
    labels, one, other = of.labels[:100], of.one[:100], of.other[:100]
    stated = {
        name.removesuffix("_low") for name in intervals.figures(one, labels, coverage.Evaluate()) if "_low" in name
    }
    gained = {
        name.removesuffix("_low") for name in intervals.gain(one, other, labels, coverage.Evaluate()) if "_low" in name
    }
    assert stated - {"worst_class_recall"} | {f"gain {name}" for name in gained} <= set(held)
    assert sum("worst class" in name for name in held) == 2
    assert set(errors) == {"ece", "ece_debiased"}
    assert all(0 <= value <= 1 for value in held.values())


def test_a_whole_run_prints_a_table_and_keeps_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--draws", "12", "--images", "60", "--classes", "5", "--models", "good"]
    assert main([*sizes, "--json", str(tmp_path / "columns.json"), "--check"]) == 0
    (column,) = json.loads((tmp_path / "columns.json").read_text(encoding="utf-8"))
    assert column["coverage"]["top1"] >= 0.6
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["| model | good |", "| --- | ---: |"]
    assert {"| test sets | 12 |", "| images | 60 |"} <= set(printed)
    assert len({line.count("|") for line in printed if line.startswith("|")}) == 1


def test_an_interval_that_is_too_narrow_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(values: np.ndarray, draws: int, seed: int, confidence: float) -> list[intervals.Interval]:
        return [intervals.Interval(mean - 0.01, mean + 0.01) for mean in values.mean(axis=0)]

    monkeypatch.setattr(intervals.bootstrap, "mean_intervals", narrow)
    column = measured(MODELS[1], 5, 250, 30)
    assert {line.split(":")[0] for line in contradicted(column)} >= {"nll"}
    assert f"| nll | **{100 * column['coverage']['nll']:.1f}** |" in table([column])
    # Of so few errors nothing is claimed.
    assert contradicted(column | {"top1": 0.99}) == []
