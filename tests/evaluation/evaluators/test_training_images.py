"""Suspects and neighbours among training images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stages.evaluation.evaluators import training_images
from stages.evaluation.evaluators.training_images import TrainingImages, look, suspects
from stages.evaluation.inference import Answer


def found(logits: np.ndarray, labels: np.ndarray) -> TrainingImages:
    own, other, suggested = training_images._probabilities(logits, labels)
    nothing = np.empty((0, 0), np.int64)
    return TrainingImages(np.empty((0, 0), np.float32), own, other, suggested, nothing)


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


class _Train:
    def __init__(self, labels: np.ndarray) -> None:
        self.label = labels

    def __len__(self) -> int:
        return len(self.label)


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_neighbours_and_means_do_not_depend_on_batches(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(50, 6)).astype(np.float32)
    labels, logits = rng.integers(0, 3, 50), rng.normal(size=(50, 3)).astype(np.float32)

    def batches(*_: Any, batch_size: int, **__: Any) -> Iterator[dict[str, Answer]]:
        for start in range(0, 50, batch_size):
            rows = slice(start, start + batch_size)
            yield {name: Answer(features[rows], logits[rows]) for name in ("finetuned", "backbone")}

    monkeypatch.setattr(training_images, "answers", batches)
    asked = features[[4, 30]] + 0.01
    nothing: Any = None
    seen = look(
        _Train(labels), nothing, nothing, asked, 3, image_size=1, resize=1, batch_size=batch_size, compute=nothing  # type: ignore[arg-type]
    )  # fmt: skip
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(asked, axis=1)[:, None]
    assert seen.nearest.tolist() == np.argsort(-(asked @ features.T / lengths), axis=1)[:, :3].tolist()
    assert seen.nearest[:, 0].tolist() == [4, 30]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for label in range(3):
        mean = unit[labels == label].mean(axis=0)
        assert np.allclose(seen.means[label], mean / np.linalg.norm(mean), atol=1e-5)
    assert np.allclose(seen.own, np.exp(logits)[np.arange(50), labels] / np.exp(logits).sum(axis=1), atol=1e-6)
