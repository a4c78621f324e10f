"""Axes."""

from stages.evaluation.charts import ticks


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 3.3, 4) == [0, 1, 2, 3]
