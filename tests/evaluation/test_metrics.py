"""Every figure equals scikit-learn's, on random input and on degenerate input."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from stages.evaluation import metrics


def _made(seed: int, n: int, classes: int, used: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, classes) that know something about the labels (n,), of which only the first `used` classes occur."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, used or classes, n)
    logits = rng.normal(size=(n, classes)).astype(np.float32) * 2
    logits[np.arange(n), labels] += 1.5
    return logits, labels


CASES = {
    "random": _made(1, 500, 6),
    "two classes": _made(2, 80, 2),
    "many classes, few images": _made(3, 40, 100),
    "classes without images": _made(4, 200, 8, used=3),
    "one image": _made(5, 1, 5),
    "only one class occurs": (_made(6, 50, 4)[0], np.full(50, 2)),
    "ties everywhere": (np.random.default_rng(7).integers(0, 3, (300, 6)).astype(np.float32), np.arange(300) % 6),
    "all logits equal": (np.zeros((30, 4), np.float32), np.arange(30) % 4),
    "all wrong": (np.eye(5, dtype=np.float32)[(np.arange(60) + 1) % 5] * 9, np.arange(60) % 5),
    "all right": (np.eye(5, dtype=np.float32)[np.arange(60) % 5] * 9, np.arange(60) % 5),
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    return request.param


def _near(value: object) -> object:
    return pytest.approx(value, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k(case: tuple[np.ndarray, np.ndarray], k: int) -> None:
    logits, labels = case
    classes = logits.shape[1]
    if k >= classes:
        assert metrics.top_k_accuracy(logits, labels, k) == 1
        return
    # scikit-learn gives ties to the *higher* index, so it is asked with the classes in reverse.
    flipped = (classes - 1 - labels, logits[:, ::-1])
    # With two classes it wants one score an image, of the second.
    expected = (
        (logits.argmax(1) == labels).mean()
        if classes == 2
        else reference.top_k_accuracy_score(*flipped, k=k, labels=range(classes))
    )
    assert metrics.top_k_accuracy(logits, labels, k) == _near(expected)


def test_ties_go_to_the_lower_index() -> None:
    logits = np.array([[1, 1, 0]], np.float32)
    assert metrics.predictions(logits) == [0]
    assert [metrics.top_k_accuracy(logits, np.array([label]), 1) for label in (0, 1)] == [1, 0]
    assert metrics.top_k_accuracy(logits, np.array([1]), 2) == 1


def test_confusion_matrix(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    predicted = metrics.predictions(logits)
    expected = reference.confusion_matrix(labels, predicted, labels=range(logits.shape[1]))
    assert (metrics.confusion_matrix(labels, predicted, logits.shape[1]) == expected).all()


def test_per_class_and_macro_f1(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    classes, predicted = logits.shape[1], metrics.predictions(logits)
    confusion = metrics.confusion_matrix(labels, predicted, classes)
    found = metrics.per_class(confusion)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, predicted, labels=range(classes), zero_division=np.nan
    )
    assert found.precision == _near(precision)
    assert found.recall == _near(recall)
    assert found.f1 == _near(f1)
    assert (found.support == support).all()
    # Its default, over the labels that occur in either: a class that is nowhere does not count.
    expected = reference.f1_score(labels, predicted, average="macro", zero_division=0)
    assert metrics.macro_f1(confusion) == _near(expected)


def test_balanced_accuracy_and_worst_class(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    predicted = metrics.predictions(logits)
    confusion = metrics.confusion_matrix(labels, predicted, logits.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of predictions of classes without images
        expected = reference.balanced_accuracy_score(labels, predicted)
    assert metrics.balanced_accuracy(confusion) == _near(expected)
    worst = metrics.worst_class(confusion)
    recalls = {c: (predicted[labels == c] == c).mean() for c in np.unique(labels)}
    assert worst is not None
    assert recalls[worst] == min(recalls.values())


def test_negative_log_likelihood(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    probabilities = np.exp(metrics.log_probabilities(logits))
    assert probabilities.sum(axis=1) == _near(np.ones(len(labels)))
    expected = reference.log_loss(labels, probabilities, labels=range(logits.shape[1]))
    assert metrics.negative_log_likelihood(logits, labels) == _near(expected)


def test_negative_log_likelihood_of_extreme_logits_is_not_clipped() -> None:
    assert metrics.negative_log_likelihood(np.array([[1000.0, 0.0]]), np.array([1])) == pytest.approx(1000)


@pytest.mark.parametrize("bins", [2, 10, 15])
def test_calibration(case: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    logits, labels = case
    confidence, correct = metrics.confidences(logits), metrics.predictions(logits) == labels
    found = metrics.reliability(logits, labels, bins)
    used = found.count > 0
    accuracy, stated = calibration_curve(correct, confidence.clip(0, 1), n_bins=bins, strategy="uniform")
    assert found.accuracy[used] == _near(accuracy)
    assert found.confidence[used] == _near(stated)
    assert np.isnan(found.accuracy[~used]).all()
    expected = (found.count[used] / len(labels) * abs(accuracy - stated)).sum()
    assert metrics.expected_calibration_error(logits, labels, bins) == _near(expected)


def test_calibration_error_as_guo_et_al_wrote_it(case: tuple[np.ndarray, np.ndarray]) -> None:
    """Their loop (temperature_scaling.py): bins (low, high]."""
    logits, labels = case
    confidence, correct = metrics.confidences(logits), metrics.predictions(logits) == labels
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += abs(correct[inside].mean() - confidence[inside].mean()) * inside.mean()
    assert metrics.expected_calibration_error(logits, labels, 15) == _near(error)


def test_figures_of_no_images_are_not_defined() -> None:
    logits, labels = np.empty((0, 3), np.float32), np.empty(0, np.int64)
    confusion = metrics.confusion_matrix(labels, labels, 3)
    figures = [
        metrics.top_k_accuracy(logits, labels, 1),
        metrics.macro_f1(confusion),
        metrics.balanced_accuracy(confusion),
        metrics.negative_log_likelihood(logits, labels),
        metrics.expected_calibration_error(logits, labels, 15),
    ]
    assert np.isnan(figures).all()
    assert metrics.worst_class(confusion) is None
