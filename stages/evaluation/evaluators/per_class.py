"""Per class: recall, precision and F1 with their intervals, and what each class is most often taken for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation import metrics
from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.metrics import Int64
from stages.evaluation.statistics.intervals import class_intervals

name = "per_class"

MOST_AT_ONCE = 40
"""Rows of a longer table that are shown; the rest, the best classes, is folded."""
COLUMNS = {
    "name": "class", "support": "support", "recall": "recall", "low": "recall_low", "high": "recall_high",
    "precision": "precision", "precision_low": "precision_low", "precision_high": "precision_high",
    "f1": "f1", "f1_low": "f1_low", "f1_high": "f1_high",
}  # fmt: skip
"""Columns of reports/plots/per_class.csv: the key of a row, and the name in the file."""


def measure(inputs: EvaluationInputs) -> Result:
    """A table of all classes on test, the lowest recall first; its figures are those of `accuracy`."""
    confusion = metrics.confusion_matrix(inputs.test.labels, inputs.test.scores.predicted, len(inputs.classes))
    rows = class_rows(inputs.classes, confusion, inputs.settings.confidence)
    values = {"rows": rows[:MOST_AT_ONCE], "more_classes": rows[MOST_AT_ONCE:]}
    table = pd.DataFrame(rows, columns=list(COLUMNS)).rename(columns=COLUMNS)
    return Result(ReportSection(Path(__file__).with_suffix(".html.j2"), values), plots={name: table})


def class_rows(classes: Sequence[str], confusion: Int64, confidence: float) -> list[dict[str, Any]]:
    """A row per class, the lowest recall first; classes without images last."""
    figures = metrics.per_class(confusion)
    ends = class_intervals(confusion, confidence)
    rows = []
    for index, class_name in enumerate(classes):
        wrong = np.where(np.arange(len(classes)) == index, 0, confusion[index])
        rows.append(
            {
                "name": class_name,
                "support": int(figures.support[index]),
                "recall": figures.recall[index],
                "low": ends.recall_low[index],
                "high": ends.recall_high[index],
                "precision": figures.precision[index],
                "precision_low": ends.precision_low[index],
                "precision_high": ends.precision_high[index],
                "f1": figures.f1[index],
                "f1_low": ends.f1_low[index],
                "f1_high": ends.f1_high[index],
                "taken_for": classes[int(wrong.argmax())] if wrong.any() else "",
                "times": int(wrong.max(initial=0)),
            }
        )
    return sorted(rows, key=lambda row: (np.isnan(row["recall"]), row["recall"]))  # the first of equals, as in figures
