"""Which test images the galleries show."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stages.evaluation.metrics import Bools, Float64, ImageScores, Int64

MISTAKES = 24
CORRECT = 12
OF_EACH = 2
"""Mistakes, and correct answers, of each class."""
DIGITS = 6
"""Digits by which confidences are compared; further ones differ between builds of numpy."""


@dataclass(frozen=True)
class Chosen:
    """Indexes of test images."""

    mistakes: Int64
    """The most confident ones."""
    correct: Int64
    """The least confident ones."""
    by_class: Mapping[int, Int64]
    """Both kinds, of each class; the classes of lowest recall first."""

    @property
    def all(self) -> Int64:
        """Each once, in order."""
        return np.unique(np.concatenate([self.mistakes, self.correct, *self.by_class.values()]))


def choose(scores: ImageScores, labels: Int64, most: int) -> Chosen:
    """The surest mistakes, the least sure correct answers, and two of both of each class, up to `most` images."""
    right, sure = scores.correct, scores.confidence.round(DIGITS)
    mistakes = _surest(~right, sure)[: min(MISTAKES, most)]
    correct = _surest(right, -sure)[: max(min(CORRECT, most - MISTAKES), 0)]
    chosen = {*mistakes, *correct}
    by_class: dict[int, Int64] = {}
    for label in _weakest_first(right, labels):
        own = labels == label
        some = np.concatenate([_surest(~right & own, sure)[:OF_EACH], _surest(right & own, -sure)[:OF_EACH]])
        if len(chosen | {*some}) > most:
            break
        chosen |= {*some}
        by_class[label] = some
    return Chosen(mistakes, correct, by_class)


def _surest(which: Bools, sure: Float64) -> Int64:
    indexes = np.flatnonzero(which)
    return indexes[np.argsort(-sure[indexes], kind="stable")].astype(np.int64)


def _weakest_first(right: Bools, labels: Int64) -> list[int]:
    present = np.unique(labels)
    recall = [right[labels == label].mean() for label in present]
    return [int(present[i]) for i in np.argsort(recall, kind="stable")]
