"""Accuracy: figures of the fine-tuned model, the backbone before, and a model from scratch; their differences."""

from pathlib import Path

import numpy as np

from stages.evaluation.charts import ticks
from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result, rounded
from stages.evaluation.statistics import intervals

name = "accuracy"

MODELS = {
    "before": ("Before", "frozen backbone, nearest class mean"),
    "test": ("After", "fine-tuned"),
    "scratch": ("From scratch", "same recipe, random start"),
}
"""Rows of the table: the key of their figures, and how they are called."""


def measure(inputs: EvaluationInputs) -> Result:
    """`test`, `before` and `scratch`, all figures on the images of test; `gain`: how much better the fine-tuned is."""
    test, settings = inputs.test, inputs.settings
    others = {"before": test.before, "scratch": test.scratch}
    figures = {"test": intervals.figures(test.finetuned, test.labels, settings)}
    for other, logits in others.items():
        figures[other] = (
            dict.fromkeys(figures["test"], np.nan)
            if logits is None
            else intervals.figures(logits, test.labels, settings, calibrated=other != "before")
        )
    gain = {
        other: intervals.gain(test.finetuned, logits, test.labels, settings, calibrated=other != "before")
        for other, logits in others.items()
        if logits is not None
    }
    shown = rounded(figures | {"gain": gain})
    rows = [
        {"id": key, "label": label, "figures": shown[key], "gain": shown["gain"].get(key)}
        for key, label in MODELS.items()
        if shown[key]["top1"] is not None
    ]
    section = ReportSection(Path(__file__).with_suffix(".html.j2"), {"models": rows, "axis": ticks(0, 1, 5)})
    return Result(section, figures | {"gain": gain})
