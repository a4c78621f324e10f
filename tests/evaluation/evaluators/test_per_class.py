"""The table of classes."""

import numpy as np

from stages.evaluation.evaluators.per_class import class_rows
from stages.evaluation.metrics import worst_class


def test_classes_come_weakest_first_with_what_they_were_taken_for() -> None:
    confusion = np.array([[9, 1, 0], [3, 5, 2], [0, 0, 0]])
    rows = class_rows(["a", "b", "c"], confusion, 0.95)
    assert [row["name"] for row in rows] == ["b", "a", "c"]
    assert (rows[0]["taken_for"], rows[0]["times"], rows[0]["recall"]) == ("a", 3, 0.5)
    assert rows[0]["low"] < 0.5 < rows[0]["high"]
    assert np.isnan(rows[2]["recall"])


def test_of_equally_weak_classes_the_first_is_the_worst_as_in_the_figures() -> None:
    confusion = np.array([[1, 1, 0], [0, 9, 1], [10, 10, 20]])
    rows = class_rows(["b", "c", "a"], confusion, 0.95)
    assert rows[0]["name"] == ["b", "c", "a"][worst_class(confusion) or 0] == "b"
