"""Drift: does a batch look different from all that came before it in its role?"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp

from stages.params.validate import Drift

FACTS = ("brightness", "contrast", "width", "height", "bytes")


class FactDrift(NamedTuple):
    """One fact of one batch against the reference. `distance` (0-1) is the effect size: the largest gap between the two
    cumulative distributions."""

    fact: str
    median: float
    reference_median: float
    distance: float
    p_value: float
    drifted: bool


def compare(batch: pd.DataFrame, reference: pd.DataFrame, limits: Drift) -> list[FactDrift]:
    """The accepted images of a batch against the accepted ones of all earlier batches of its role, fact by fact.

    The two-sample Kolmogorov-Smirnov test (asymptotic p value, as in `scipy.stats.ks_2samp`). It is drift where the
    difference is both significant and large. Nothing to compare (either side empty) gives an empty list.
    """
    if batch.empty or reference.empty:
        return []
    rows = []
    for fact in FACTS:
        new, old = (side[fact].to_numpy(np.float64) for side in (batch, reference))
        test = ks_2samp(new, old, method="asymp")
        distance, p_value = round(float(test.statistic), 6), float(f"{test.pvalue:.3g}")
        drifted = p_value < limits.alpha and distance >= limits.min_effect
        rows.append(FactDrift(fact, _median(new), _median(old), distance, p_value, drifted))
    return rows


def _median(values: np.ndarray) -> float:
    return round(float(np.median(values)), 3)
