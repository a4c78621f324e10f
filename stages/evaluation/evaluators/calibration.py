"""Calibration: accuracy against the confidence that the model states."""

from pathlib import Path

import numpy as np
import pandas as pd

from stages.evaluation.charts import ticks
from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.metrics import Reliability, reliability_curve
from stages.evaluation.statistics.intervals import calibration_noise

name = "calibration"


def measure(inputs: EvaluationInputs) -> Result:
    """The reliability diagram, and the ECE that a perfectly calibrated model would show on as many images.

    The ECE itself is a figure of `accuracy`.
    """
    scores, settings = inputs.test.scores, inputs.settings
    curve = reliability_curve(scores.confidence, scores.correct, settings.calibration_bins)
    noise = calibration_noise(scores.confidence, settings.calibration_bins, settings.bootstrap, settings.seed)
    bins = pd.DataFrame({"confidence": curve.confidence, "accuracy": curve.accuracy, "count": curve.count})
    values = {"bins": reliability_bars(curve), "axis": ticks(0, 1, 5), "calibrated_ece": float(noise.mean())}
    section = ReportSection(Path(__file__).with_suffix(".html.j2"), values)
    return Result(section, plots={"reliability": bins[curve.count > 0]})


def reliability_bars(curve: Reliability) -> list[dict[str, float]]:
    """The bins that hold images: edges, confidence, accuracy, images, and the share of the fullest bin."""
    fullest = max(curve.count.max(initial=0), 1)
    return [
        {
            "low": curve.low[i],
            "high": curve.high[i],
            "confidence": curve.confidence[i],
            "accuracy": curve.accuracy[i],
            "count": int(curve.count[i]),
            "height": curve.count[i] / fullest,
        }
        for i in np.flatnonzero(curve.count)
    ]
