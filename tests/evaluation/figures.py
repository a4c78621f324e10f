"""Figures straight from logits (N, C) and labels (N,), as the tests compare them with other libraries."""

import numpy as np

from stages.evaluation import metrics
from stages.evaluation.metrics import Bools, Float64, Floats, Int64, Reliability, Selective


def _mean(values: Float64 | Bools) -> float:
    return float(values.mean()) if len(values) else float("nan")


def top_k_accuracy(logits: Floats, labels: Int64, k: int) -> float:
    """Share of images whose true class is among the k most likely; NaN of no images."""
    return _mean(np.asarray(metrics.label_ranks(logits, labels) < k))


def negative_log_likelihood(logits: Floats, labels: Int64) -> float:
    """Mean over the images, in nats; NaN of no images. scikit-learn's `log_loss`."""
    return _mean(metrics.image_scores(logits, labels).loss)


def brier(logits: Floats, labels: Int64) -> float:
    """Mean over the images, 0 (certain and right) to 2 (certain and wrong); NaN of no images.

    scikit-learn's `brier_score_loss` with `scale_by_half=False`; with two classes twice that of the second alone.
    """
    return _mean(metrics.image_scores(logits, labels).brier)


def reliability(logits: Floats, labels: Int64, bins: int) -> Reliability:
    """The curve of `metrics.reliability_curve`."""
    scores = metrics.image_scores(logits, labels)
    return metrics.reliability_curve(scores.confidence, scores.correct, bins)


def expected_calibration_error(logits: Floats, labels: Int64, bins: int) -> float:
    """ECE of equal bins."""
    return metrics.calibration_error(reliability(logits, labels, bins))


def debiased_ece(logits: Floats, labels: Int64, bins: int) -> float:
    """ECE less the noise of few images."""
    return metrics.debiased_calibration_error(reliability(logits, labels, bins))


def selective_accuracy(logits: Floats, labels: Int64) -> Selective:
    """The curve of `metrics.selective_curve`."""
    scores = metrics.image_scores(logits, labels)
    return metrics.selective_curve(scores.confidence, scores.correct)


def aurc(logits: Floats, labels: Int64) -> float:
    """Area under the risk-coverage curve."""
    return metrics.risk_coverage_area(selective_accuracy(logits, labels))
