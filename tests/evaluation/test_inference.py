"""The head of class means, and one pass over the images for all models."""

import numpy as np
from sklearn.metrics.pairwise import cosine_similarity

from stages.evaluation.inference import SCALE, add_directions, nearest_class_mean, unit


def class_means(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    sums = np.zeros((classes, features.shape[1]), np.float32)
    for part in np.array_split(np.arange(len(labels)), 2):  # they come batch by batch
        add_directions(sums, features[part], labels[part])
    return unit(sums)


def test_logits_are_cosine_similarities_to_the_mean_direction_of_each_class() -> None:
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(40, 7)).astype(np.float32), np.arange(40) % 4
    asked = rng.normal(size=(9, 7)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([unit[labels == c].mean(axis=0) for c in range(4)])
    found = nearest_class_mean(asked, class_means(features, labels, 4))
    assert np.allclose(found, SCALE * cosine_similarity(asked, means), atol=1e-4)
    assert found.dtype == np.float32


def test_the_length_of_features_does_not_matter_and_none_is_not_an_error() -> None:
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(12, 5)).astype(np.float32), np.arange(12) % 3
    means = class_means(features, labels, 3)
    assert np.allclose(class_means(100 * features, labels, 3), means, atol=1e-6)
    assert np.isfinite(nearest_class_mean(np.zeros((2, 5), np.float32), means)).all()


def test_a_class_without_training_images_is_never_the_answer() -> None:
    features = -np.eye(3, dtype=np.float32)[:2]
    means = class_means(features, np.array([0, 2]), 3)
    answers = nearest_class_mean(-features, means).argmax(axis=1)
    assert 1 not in answers
