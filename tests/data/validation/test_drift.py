"""Drift: significant and large, or none."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp

from stages.data.validation.drift import FACTS, compare
from stages.params.validate import Drift


def _images(count: int, seed: int, brighter: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    facts = pd.DataFrame({fact: rng.normal(100, 20, count) for fact in FACTS})
    facts["brightness"] += brighter
    return facts


def test_a_brighter_batch_drifts_in_brightness_alone() -> None:
    found = {row.fact: row for row in compare(_images(500, 1, brighter=20), _images(2000, 2), Drift())}
    assert [fact for fact, row in found.items() if row.drifted] == ["brightness"]
    assert found["brightness"].median > found["brightness"].reference_median + 15


def test_a_large_batch_with_a_tiny_difference_does_not() -> None:
    found = {row.fact: row for row in compare(_images(100_000, 1, brighter=1), _images(100_000, 2), Drift())}
    assert found["brightness"].p_value < 1e-6
    assert not found["brightness"].drifted


def test_a_small_batch_with_a_large_difference_by_chance_does_not() -> None:
    found = compare(_images(8, 3), _images(2000, 2), Drift())
    assert max(row.distance for row in found) > 0.1
    assert not any(row.drifted for row in found)


def test_the_figures_are_those_of_scipy() -> None:
    new, old = _images(300, 1, brighter=5), _images(900, 2)
    expected = ks_2samp(new["brightness"], old["brightness"], method="asymp")
    found = compare(new, old, Drift())[0]
    assert found.distance == pytest.approx(expected.statistic, abs=1e-6)
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.01)


def test_the_first_batch_has_nothing_to_differ_from() -> None:
    assert compare(_images(10, 1), _images(0, 2), Drift()) == []
