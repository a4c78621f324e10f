"""Planted labels are suspected."""

import numpy as np

from stages.evaluation.evaluators.label_errors import suspects
from stages.evaluation.training_pass import TrainingPredictions, label_probabilities


def found(logits: np.ndarray, labels: np.ndarray) -> TrainingPredictions:
    own, other, suggested = label_probabilities(logits, labels)
    nothing = np.empty((0, 0), np.int64)
    return TrainingPredictions(np.empty((0, 0), np.float32), own, other, suggested, nothing)


def test_planted_labels_come_first() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 2000)
    planted = np.zeros(2000, bool)
    planted[rng.permutation(2000)[:60]] = True
    labels = np.where(planted, (truth + 1 + rng.integers(0, 4, 2000)) % 5, truth)
    logits = rng.normal(size=(2000, 5)).astype(np.float32)
    logits[np.arange(2000), truth] += 3
    ranked = suspects(found(logits, labels), labels, 5)
    assert planted[ranked[:40]].mean() > 0.9
    assert len(ranked) < 400


def test_thresholds_are_of_each_class() -> None:
    # The second class is hard: its own images get 0.5. One of the first class with 0.5 for the second is suspect.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.45, 0.55], [0.5, 0.5], [0.5, 0.5]])
    labels = np.array([0, 0, 0, 1, 1])
    assert suspects(found(np.log(probabilities).astype(np.float32), labels), labels, 2).tolist() == [2]


def test_a_class_without_images_is_never_suggested() -> None:
    logits = np.array([[0.0, 1.0, 9.0], [1.0, 0.0, 9.0]], np.float32)
    assert suspects(found(logits, np.array([0, 1])), np.array([0, 1]), 3).size == 0
