"""What the page says is what the figures are, and no name can break out of it."""

import numpy as np

from stages.evaluation import report
from stages.evaluation.metrics import confusion_matrix


def test_classes_come_weakest_first_with_what_they_were_taken_for() -> None:
    confusion = np.array([[9, 1, 0], [3, 5, 2], [0, 0, 0]])
    rows = report.class_rows(["a", "b", "c"], confusion, 0.95)
    assert [row["name"] for row in rows] == ["b", "a", "c"]
    assert (rows[0]["taken_for"], rows[0]["times"], rows[0]["recall"]) == ("a", 3, 0.5)
    assert rows[0]["low"] < 0.5 < rows[0]["high"]
    assert np.isnan(rows[2]["recall"])


def test_confused_pairs_are_mistakes_the_most_frequent_first() -> None:
    pairs = report.confused_pairs(["a", "b"], np.array([[9, 1], [3, 5]]))
    assert [(pair["actual"], pair["predicted"], pair["times"]) for pair in pairs] == [("b", "a", 3), ("a", "b", 1)]
    assert report.confused_pairs(["a", "b"], np.diag([3, 4])) == []


def test_of_many_classes_the_heat_map_shows_those_with_mistakes() -> None:
    labels = np.arange(500) % 100
    predicted = np.where(labels == 77, 5, labels)
    shown = report.heat_map([str(i) for i in range(100)], confusion_matrix(labels, predicted, 100))
    assert len(shown["rows"]) == report.MOST_CLASSES_IN_HEAT_MAP
    assert {"77", "5"} <= set(shown["names"])
    assert not shown["whole"]


def test_ticks_are_round_and_within() -> None:
    assert report.ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert report.ticks(0, 3.3, 4) == [0, 1, 2, 3]


def test_figures_as_text() -> None:
    assert report.percent(0.8531) == "85.3\u00a0%"
    assert report.percent(None) == report.percent(float("nan")) == report.as_range(None, 1) == "–"
    assert report.signed(-0.012) == "−1.2"


def test_names_are_escaped() -> None:
    assert report.breakable("<b>_x") == "&lt;b&gt;_<wbr>x"
