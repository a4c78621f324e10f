"""One pass over the training images: neighbours and means."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stages.evaluation import training_pass
from stages.evaluation.inference import ImageFormat, ModelOutput


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

    def batches(_: Any, __: Any, image: ImageFormat, ___: Any) -> Iterator[dict[str, ModelOutput]]:
        for start in range(0, 50, image.batch_size):
            rows = slice(start, start + image.batch_size)
            yield {name: ModelOutput(features[rows], logits[rows]) for name in ("finetuned", "backbone")}

    monkeypatch.setattr(training_pass, "predict_batches", batches)
    asked = features[[4, 30]] + 0.01
    nothing: Any = None
    models = {"finetuned": nothing, "backbone": nothing}
    image = ImageFormat(image_size=1, resize=1, batch_size=batch_size)
    train: Any = _Train(labels)
    seen = training_pass.predict_training_images(train, models, asked, 3, image, nothing)
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(asked, axis=1)[:, None]
    assert seen.nearest.tolist() == np.argsort(-(asked @ features.T / lengths), axis=1)[:, :3].tolist()
    assert seen.nearest[:, 0].tolist() == [4, 30]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for label in range(3):
        mean = unit[labels == label].mean(axis=0)
        assert np.allclose(seen.means[label], mean / np.linalg.norm(mean), atol=1e-5)
    assert np.allclose(seen.own, np.exp(logits)[np.arange(50), labels] / np.exp(logits).sum(axis=1), atol=1e-6)
