"""Selective prediction: accuracy of a model that abstains from the images it is least sure of."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation.charts import ticks
from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.metrics import Selective, selective_curve

name = "selective"


def measure(inputs: EvaluationInputs) -> Result:
    """The curve of accuracy against coverage; its figures are those of `accuracy`."""
    scores = inputs.test.scores
    rows = curve_rows(selective_curve(scores.confidence, scores.correct))
    values = {"curve": chart(rows), "axis": ticks(0, 1, 5)}
    table = pd.DataFrame(rows, columns=["coverage", "accuracy", "confidence"])
    return Result(ReportSection(Path(__file__).with_suffix(".html.j2"), values), plots={name: table})


def chart(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Ticks and points as shares of the chart's height and width."""
    least = min((row["accuracy"] for row in rows), default=0.0)
    bottom = np.floor(10 * least) / 10 if least < 1 else 0.9
    heights = [{"value": value, "height": (value - bottom) / (1 - bottom)} for value in ticks(bottom, 1, 5)]
    points = [(row["coverage"], (row["accuracy"] - bottom) / (1 - bottom)) for row in rows]
    return {"ticks": heights, "points": points}


def curve_rows(curve: Selective) -> list[dict[str, float]]:
    """Accuracy and lowest confidence at each percent of coverage, or at each image where there are fewer than 100."""
    n = len(curve.coverage)
    places = np.unique(np.ceil(np.linspace(0, n, 101)[1:]).astype(np.int64) - 1)[:n]
    return [
        {
            "coverage": float(curve.coverage[i]),
            "accuracy": float(curve.accuracy[i]),
            "confidence": float(curve.confidence[i]),
        }
        for i in places
    ]
