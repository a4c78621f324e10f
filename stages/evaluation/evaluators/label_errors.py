"""Label errors: training images that look mislabelled, by confident learning (Northcutt et al. 2021)."""

from pathlib import Path

import numpy as np
import pandas as pd

from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.metrics import Int64
from stages.evaluation.training_pass import TrainingPredictions
from stages.pages.images import jpeg_thumbnail

name = "label_errors"

SHOWN = 24
COLUMNS = ["key", "batch", "label", "suggested", "label_probability", "suggested_probability"]
"""Of reports/label_suspects.csv."""


def measure(inputs: EvaluationInputs) -> Result:
    """reports/label_suspects.csv, the most suspicious first, and pictures of the first ones."""
    train, predicted, classes = inputs.train, inputs.training, inputs.classes
    indexes = suspects(predicted, train.label, len(classes))
    rows = [
        {
            "key": train.key[i],
            "batch": train.batch_names[train.batch[i]],
            "label": classes[train.label[i]],
            "suggested": classes[predicted.suggested[i]],
            "label_probability": predicted.own[i],
            "suggested_probability": predicted.other[i],
        }
        for i in indexes
    ]
    pictures = [
        row | {"jpeg": jpeg_thumbnail(train.jpeg(int(i)))} for row, i in zip(rows[:SHOWN], indexes, strict=False)
    ]
    return Result(
        ReportSection(Path(__file__).with_suffix(".html.j2"), {"suspects": pictures, "found": len(indexes)}),
        tables={"label_suspects": pd.DataFrame(rows, columns=COLUMNS)},
    )


def suspects(predicted: TrainingPredictions, labels: Int64, classes: int) -> Int64:
    """Indexes (K,) of training images that look mislabelled, the most suspicious first.

    The threshold of a class is the mean probability that its own images get. An image is suspect if its label gets less
    than the label's threshold while another class gets at least its own threshold. The least likely label comes first.

    Args:
        labels: (N,) as given.
    """
    counts = np.bincount(labels, minlength=classes)
    thresholds = np.divide(
        np.bincount(labels, predicted.own, minlength=classes), counts, out=np.full(classes, np.inf), where=counts > 0
    )
    suspect = (predicted.own < thresholds[labels]) & (predicted.other >= thresholds[predicted.suggested])
    indexes = np.flatnonzero(suspect)
    return indexes[np.argsort(np.round(predicted.own[indexes], 6), kind="stable")].astype(np.int64)
