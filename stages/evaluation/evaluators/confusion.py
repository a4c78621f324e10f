"""Confusion: which classes are taken for which, as pairs, as a heat map and as the whole matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.evaluators.confusion_map import confusion_map
from stages.evaluation.metrics import Int64, confusion_matrix

name = "confusion"

MOST_PAIRS = 12
MOST_IN_HEAT_MAP = 24
"""Classes; of more, the heat map shows those with the most mistakes."""


def measure(inputs: EvaluationInputs) -> Result:
    """The section, and actual and predicted class of each test image; its figures are those of `accuracy`."""
    test, classes = inputs.test, inputs.classes
    confusion = confusion_matrix(test.labels, test.scores.predicted, len(classes))
    values = {
        "pairs": confused_pairs(classes, confusion),
        "heat_map": heat_map(classes, confusion),
        "map": confusion_map(classes, confusion),
    }
    names = np.array(classes)
    table = pd.DataFrame({"actual": names[test.labels], "predicted": names[test.scores.predicted]})
    return Result(ReportSection(Path(__file__).with_suffix(".html.j2"), values), plots={name: table})


def confused_pairs(classes: Sequence[str], confusion: Int64) -> list[dict[str, Any]]:
    """The most frequent mistakes, as counts and as shares of the true class."""
    wrong = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        {
            "actual": classes[i],
            "predicted": classes[j],
            "times": int(wrong[i, j]),
            "share": wrong[i, j] / confusion[i].sum(),
        }
        for i, j in pairs
        if wrong[i, j]
    ]


def heat_map(classes: Sequence[str], confusion: Int64) -> dict[str, Any]:
    """Counts and shares of the row, of all classes or, of too many, of those with the most mistakes."""
    mistakes = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_IN_HEAT_MAP])
    support = np.maximum(confusion.sum(axis=1), 1)
    rows = [
        {
            "name": classes[i],
            "cells": [
                {"times": int(confusion[i, j]), "share": confusion[i, j] / support[i], "hit": i == j} for j in shown
            ],
        }
        for i in shown
    ]
    return {"names": [classes[j] for j in shown], "rows": rows, "whole": len(shown) == len(classes)}
