"""Every figure equals scikit-learn's or torchmetrics', on random input and on degenerate input."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from stages.evaluation import metrics
from tests.evaluation import figures


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
        assert figures.top_k_accuracy(logits, labels, k) == 1
        return
    # scikit-learn gives ties to the *higher* index, so it is asked with the classes in reverse.
    flipped = (classes - 1 - labels, logits[:, ::-1])
    # With two classes it wants one score an image, of the second.
    expected = (
        (logits.argmax(1) == labels).mean()
        if classes == 2
        else reference.top_k_accuracy_score(*flipped, k=k, labels=range(classes))
    )
    assert figures.top_k_accuracy(logits, labels, k) == _near(expected)


def test_ties_go_to_the_lower_index() -> None:
    logits = np.array([[1, 1, 0]], np.float32)
    assert metrics.predicted_classes(logits) == [0]
    assert [figures.top_k_accuracy(logits, np.array([label]), 1) for label in (0, 1)] == [1, 0]
    assert figures.top_k_accuracy(logits, np.array([1]), 2) == 1


def test_confusion_matrix(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    predicted = metrics.predicted_classes(logits)
    expected = reference.confusion_matrix(labels, predicted, labels=range(logits.shape[1]))
    assert (metrics.confusion_matrix(labels, predicted, logits.shape[1]) == expected).all()


def test_per_class_and_macro_f1(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    classes, predicted = logits.shape[1], metrics.predicted_classes(logits)
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
    predicted = metrics.predicted_classes(logits)
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
    assert figures.negative_log_likelihood(logits, labels) == _near(expected)


def test_negative_log_likelihood_of_extreme_logits_is_not_clipped() -> None:
    assert figures.negative_log_likelihood(np.array([[1000.0, 0.0]]), np.array([1])) == pytest.approx(1000)


def test_brier(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    probabilities, classes = np.exp(metrics.log_probabilities(logits)), logits.shape[1]
    expected = reference.brier_score_loss(labels, probabilities, labels=range(classes), scale_by_half=False)
    assert figures.brier(logits, labels) == _near(expected)
    truth = np.eye(classes)[labels]
    assert metrics.image_scores(logits, labels).brier == _near(((probabilities - truth) ** 2).sum(axis=1))


def test_brier_of_two_classes_is_twice_that_of_the_second() -> None:
    logits, labels = CASES["two classes"]
    second = np.exp(metrics.log_probabilities(logits))[:, 1]
    assert figures.brier(logits, labels) == _near(2 * reference.brier_score_loss(labels, second))
    certain = np.array([[1e4, -1e4]])
    assert [figures.brier(certain, np.array([label])) for label in (0, 1)] == [0, 2]


def test_answers_are_those_of_each_metric_whatever_the_chunk(
    case: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = case
    monkeypatch.setattr(metrics, "CHUNK", 7 * logits.shape[1])
    found = metrics.image_scores(logits, labels)
    assert (found.predicted == metrics.predicted_classes(logits)).all()
    assert (found.rank == metrics.label_ranks(logits, labels)).all()
    assert (found.correct == (found.predicted == labels)).all()
    logs = metrics.log_probabilities(logits)
    assert found.confidence == pytest.approx(np.exp(logs.max(axis=1)), abs=1e-12)
    assert found.loss == pytest.approx(-logs[np.arange(len(labels)), labels], abs=1e-9)


@pytest.mark.parametrize("bins", [2, 10, 15])
def test_calibration(case: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    logits, labels = case
    confidence, correct = metrics.image_scores(logits, labels).confidence, metrics.predicted_classes(logits) == labels
    found = figures.reliability(logits, labels, bins)
    used = found.count > 0
    accuracy, stated = calibration_curve(correct, confidence.clip(0, 1), n_bins=bins, strategy="uniform")
    assert found.accuracy[used] == _near(accuracy)
    assert found.confidence[used] == _near(stated)
    assert np.isnan(found.accuracy[~used]).all()
    expected = (found.count[used] / len(labels) * abs(accuracy - stated)).sum()
    assert figures.expected_calibration_error(logits, labels, bins) == _near(expected)


def test_calibration_error_as_guo_et_al_wrote_it(case: tuple[np.ndarray, np.ndarray]) -> None:
    """Their loop (temperature_scaling.py): bins (low, high]."""
    logits, labels = case
    confidence, correct = metrics.image_scores(logits, labels).confidence, metrics.predicted_classes(logits) == labels
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += abs(correct[inside].mean() - confidence[inside].mean()) * inside.mean()
    assert figures.expected_calibration_error(logits, labels, 15) == _near(error)


@pytest.mark.parametrize("bins", [2, 10, 15])
def test_calibration_error_is_that_of_torchmetrics(case: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    """No confidence here lies on the edge of a bin, where they differ: its are closed below, Guo et al.'s above."""
    import torch  # some seconds, for this one test
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = case
    probabilities = torch.from_numpy(np.exp(metrics.log_probabilities(logits)))
    expected = multiclass_calibration_error(probabilities, torch.from_numpy(labels), logits.shape[1], bins)
    assert figures.expected_calibration_error(logits, labels, bins) == _near(float(expected))


def test_debiased_calibration_error_as_kumar_et_al_draw_it(case: tuple[np.ndarray, np.ndarray]) -> None:
    """Their procedure, integrated instead of drawn: twice the ECE less its mean over normal accuracies of the bins."""
    logits, labels = case
    confidence, correct = metrics.image_scores(logits, labels).confidence, metrics.predicted_classes(logits) == labels
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if not inside.any():
            continue
        accuracy, stated, n = correct[inside].mean(), confidence[inside].mean(), inside.sum()
        spread = np.sqrt(accuracy * (1 - accuracy) / n)
        # Split at the kink of |x|, up to which the integrand is smooth.
        cuts = np.clip([-12, (stated - accuracy) / spread, 12], -12, 12) if spread else [0, 0]
        mean = (
            sum(quad(lambda z: abs(accuracy + spread * z - stated) * norm.pdf(z), *ends)[0] for ends in pairwise(cuts))  # noqa: B023
            if spread
            else abs(accuracy - stated)
        )
        error += (2 * abs(accuracy - stated) - mean) * inside.mean()
    assert figures.debiased_ece(logits, labels, 15) == _near(error)


def test_debiased_calibration_error_is_nearer_the_truth() -> None:
    rng = np.random.default_rng(8)
    found: dict[float, list[tuple[float, float]]] = {1.0: [], 1.6: []}
    for sharper, errors in found.items():
        for _ in range(200):
            logits = rng.normal(size=(400, 6)) * 2
            chances = np.exp(metrics.log_probabilities(logits)).cumsum(axis=1)
            labels = (chances > rng.random((400, 1))).argmax(axis=1)
            scaled = sharper * logits
            errors.append(
                (figures.expected_calibration_error(scaled, labels, 15), figures.debiased_ece(scaled, labels, 15))
            )
    plain, debiased = np.mean(found[1.0], axis=0)  # of which nothing is true
    assert 0 < debiased < 0.7 * plain
    plain, debiased = np.mean(found[1.6], axis=0)
    logits = rng.normal(size=(400_000, 6)) * 2
    chances = np.exp(metrics.log_probabilities(logits)).cumsum(axis=1)
    labels = (chances > rng.random((400_000, 1))).argmax(axis=1)
    truth = figures.expected_calibration_error(1.6 * logits, labels, 15)
    assert abs(debiased - truth) < 0.6 * (plain - truth)


def test_selective_accuracy(case: tuple[np.ndarray, np.ndarray]) -> None:
    """Against accuracy_score of the k surest; of those that tie at the end each counts in part."""
    logits, labels = case
    confidence, predicted = metrics.image_scores(logits, labels).confidence, metrics.predicted_classes(logits)
    found = figures.selective_accuracy(logits, labels)
    assert found.coverage == _near(np.arange(1, len(labels) + 1) / len(labels))
    expected = []
    for kept in range(1, len(labels) + 1):
        least = np.sort(confidence)[-kept]
        surer, equal = confidence > least, confidence == least
        weight = surer + equal * (kept - surer.sum()) / equal.sum()
        expected.append(reference.accuracy_score(labels, predicted, sample_weight=weight))
        assert found.confidence[kept - 1] == least
    assert found.accuracy == _near(np.array(expected))
    assert found.accuracy[-1] == _near(figures.top_k_accuracy(logits, labels, 1))
    assert figures.aurc(logits, labels) == _near(1 - np.mean(expected))
    assert metrics.accuracy_at(found, 1.0) == found.accuracy[-1]
    order = np.random.default_rng(1).permutation(len(labels))
    again = figures.selective_accuracy(logits[order], labels[order])
    assert again.accuracy == pytest.approx(found.accuracy, abs=1e-12)


def test_accuracy_at_a_coverage() -> None:
    confidence, correct = np.array([0.9, 0.5, 0.8, 0.6, 0.7]), np.array([True, False, True, False, True])
    curve = metrics.selective_curve(confidence, correct)
    assert curve.accuracy == _near([1, 1, 1, 3 / 4, 3 / 5])
    assert [metrics.accuracy_at(curve, share) for share in (0.2, 0.6, 0.61, 0.8, 1)] == [1, 1, 0.75, 0.75, 0.6]
    assert metrics.risk_coverage_area(curve) == _near((0 + 0 + 0 + 1 / 4 + 2 / 5) / 5)


def test_figures_of_no_images_are_not_defined() -> None:
    logits, labels = np.empty((0, 3), np.float32), np.empty(0, np.int64)
    confusion = metrics.confusion_matrix(labels, labels, 3)
    values = [
        figures.top_k_accuracy(logits, labels, 1),
        metrics.macro_f1(confusion),
        metrics.balanced_accuracy(confusion),
        figures.negative_log_likelihood(logits, labels),
        figures.brier(logits, labels),
        figures.expected_calibration_error(logits, labels, 15),
        figures.debiased_ece(logits, labels, 15),
        figures.aurc(logits, labels),
        metrics.accuracy_at(figures.selective_accuracy(logits, labels), 0.8),
    ]
    assert np.isnan(values).all()
    assert metrics.worst_class(confusion) is None
