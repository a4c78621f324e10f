"""Intervals cover the truth as often as they say, and the exact test errs as often as it says."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from stages.evaluation import intervals, metrics
from stages.params.evaluate import Evaluate


def test_wilson_is_the_score_interval() -> None:
    hits, n = np.array([0, 1, 7, 50, 99, 100]), np.array([10, 10, 8, 100, 100, 100])
    low, high = intervals.wilson(hits, n, 0.95)
    for i in range(len(n)):
        expected = stats.binomtest(int(hits[i]), int(n[i])).proportion_ci(0.95, method="wilson")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert np.isnan(intervals.wilson(0, 0, 0.95)).all()


def test_mcnemar_is_the_exact_binomial_test() -> None:
    rng = np.random.default_rng(1)
    for n, share in ((1, 0.5), (20, 0.5), (300, 0.4), (2000, 0.55)):
        one, other = rng.random(n) < 0.8, rng.random(n) < share
        test = intervals.mcnemar(one, other)
        assert (test.won, test.lost) == ((one & ~other).sum(), (~one & other).sum())
        tosses = test.won + test.lost
        expected = [
            stats.binomtest(test.won, tosses, alternative=side).pvalue if tosses else 1.0
            for side in ("greater", "less", "two-sided")
        ]
        assert (test.better, test.worse, test.two_sided) == pytest.approx(tuple(expected), rel=1e-9)


def test_mcnemar_of_identical_models_says_nothing() -> None:
    right = np.array([True, False, True])
    assert intervals.mcnemar(right, right) == (0, 0, 1, 1, 1)


def test_mcnemar_errs_at_most_as_often_as_it_says() -> None:
    tosses = np.random.default_rng(2).binomial(700, 0.12, 20_000)
    won = np.random.default_rng(3).binomial(tosses, 0.5)
    p = intervals.at_least(won, tosses)
    for alpha in (0.01, 0.05, 0.2):
        assert alpha / 3 < (p <= alpha).mean() <= alpha * 1.06


@pytest.mark.parametrize("margin", [-0.3, -0.05, -0.01, 0.01, 0.1])
@pytest.mark.parametrize("images", [1, 7, 30])
def test_the_paired_test_errs_at_most_as_often_as_it_says(images: int, margin: float) -> None:
    """Summed over every outcome, at the edge of the null hypothesis, however often the two disagree."""
    won, lost = (each.ravel() for each in np.indices((images + 1, images + 1)))
    won, lost = won[won + lost <= images], lost[won + lost <= images]
    outcomes = np.stack([won, lost, images - won - lost], axis=1)
    p = np.array([intervals.paired_p(int(w), int(n), images, margin, 0.05) for w, n in zip(won, lost, strict=True)])
    assert ((p >= 0) & (p <= 1)).all()
    for share in np.linspace(abs(margin), 1, 25):
        chances = [(share + margin) / 2, (share - margin) / 2]
        weights = stats.multinomial.pmf(outcomes, images, [*chances, max(0.0, 1 - sum(chances))])
        for alpha in (0.01, 0.05):
            assert weights[p <= alpha].sum() <= alpha + 1e-9


def test_the_paired_test_without_a_margin_is_mcnemar() -> None:
    assert intervals.paired_p(20, 8, 1000, 0, 0.05) == stats.binomtest(20, 28, alternative="greater").pvalue


def test_the_paired_test_grows_surer_with_every_image_won_or_not_lost() -> None:
    for margin in (-0.02, 0.02):
        p = {(w, n): intervals.paired_p(w, n, 400, margin, 0.05) for w in range(0, 40, 4) for n in range(0, 40, 4)}
        sure = [(w, n) for (w, n), value in p.items() if value < 0.5]
        assert all(p[w, n] >= p[w + 4, n] for w, n in sure if (w + 4, n) in p)
        assert all(p[w, n] >= p[w, n - 4] for w, n in sure if (w, n - 4) in p)


def test_the_paired_test_on_nothing_on_agreement_and_on_very_many() -> None:
    for margin in (-0.01, 0, 0.01):
        assert intervals.paired_p(0, 0, 0, margin, 0.05) == 1
    assert intervals.paired_p(0, 0, 50_000, -0.01, 0.05) < 0.001  # alike on so many: not a point apart
    assert intervals.paired_p(0, 0, 50_000, 0.01, 0.05) == 1
    assert intervals.paired_p(3000, 3000, 50_000, -0.01, 0.05) < 0.001
    assert intervals.paired_p(3000, 2000, 50_000, 0.01, 0.05) < 0.001
    assert intervals.paired_p(50_000, 0, 50_000, 0.01, 0.05) < 0.001
    # Near the edge the normal approximation is good enough to compare with: 500 more of 50,000 are the margin.
    assert intervals.paired_p(3400, 2800, 50_000, 0.01, 0.05) == pytest.approx(stats.norm.sf(100 / 6200**0.5), rel=0.05)


def test_paired_interval_covers_and_holds_the_difference() -> None:
    rng = np.random.default_rng(12)
    drawn = rng.multinomial(600, [0.08, 0.05, 0.87], size=2000)
    low, high = intervals.paired_interval(drawn[:, 0], drawn[:, 1], 600, 0.95)
    assert 0.935 <= ((low <= 0.03) & (high >= 0.03)).mean() <= 0.965
    difference = (drawn[:, 0] - drawn[:, 1]) / 600
    assert ((low < difference) & (difference < high)).all()
    low, high = intervals.paired_interval([0, 5, 0, 1], [0, 0, 5, 0], [0, 5, 5, 10], 0.95)
    assert np.isnan([low[0], high[0]]).all()
    assert (high[1], low[2]) == pytest.approx((1, -1), abs=1e-6)
    assert low[3] < 0.1 < high[3]


def test_clopper_pearson_is_the_exact_interval() -> None:
    for hits, n in ((0, 10), (3, 10), (10, 10), (70, 5000)):
        expected = stats.binomtest(hits, n).proportion_ci(0.99, method="exact")
        assert intervals.clopper_pearson(hits, n, 0.99) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert intervals.clopper_pearson(0, 0, 0.99) == (0, 1)


def test_holm_steps_down() -> None:
    assert intervals.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert intervals.holm([0.6, 0.7]).tolist() == [1, 1]
    assert intervals.holm([]).tolist() == []


def test_macro_f1_interval_is_a_bootstrap_over_images() -> None:
    """The draw over cells of the confusion matrix against images drawn again and scored by scikit-learn."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 4, 120)
    predicted = np.where(rng.random(120) < 0.7, labels, rng.integers(0, 4, 120))
    confusion = metrics.confusion_matrix(labels, predicted, 4)
    found = intervals.macro_f1_interval(confusion, 4000, 1, 0.9)
    scores = [f1_score(labels[i], predicted[i], average="macro") for i in rng.integers(0, 120, (400, 120))]
    low, high = np.quantile(scores, [0.05, 0.95])
    estimate = f1_score(labels, predicted, average="macro")
    assert found == pytest.approx((2 * estimate - high, 2 * estimate - low), abs=0.015)


def test_coverage_of_macro_f1_with_five_images_a_class() -> None:
    """Where it is biased most: the mean estimate is two points low."""
    rng = np.random.default_rng(11)
    recall = rng.uniform(0.6, 0.98, 100)
    chances = (1 - recall)[:, None] * rng.dirichlet(np.full(100, 0.5), 100) + np.diag(recall)
    truth = float((2 * chances.diagonal() / (chances.sum(axis=0) + 1)).mean())
    draws = [rng.multinomial(500, chances.ravel() / 100).reshape(100, 100) for _ in range(200)]
    ends = [intervals.macro_f1_interval(drawn, 200, seed, 0.95) for seed, drawn in enumerate(draws)]
    assert 0.89 <= _coverage(truth, ends) <= 0.99


def _coverage(truth: float, ends: list[intervals.Interval]) -> float:
    return float(np.mean([low <= truth <= high for low, high in ends]))


def test_coverage_of_a_mean_and_of_a_paired_difference() -> None:
    rng = np.random.default_rng(5)
    ends = [intervals.mean_interval(rng.exponential(size=500), 300, seed, 0.95) for seed in range(400)]
    assert 0.92 <= _coverage(1.0, ends) <= 0.98
    differences = []
    for seed in range(1000):
        shared, own, other = rng.random(600), rng.random(600) < 0.85, rng.random(600) < 0.8
        one, two = np.where(shared < 0.7, shared < 0.6, own), np.where(shared < 0.7, shared < 0.6, other)
        differences.append(intervals.accuracy_difference_interval(one, two, 400, seed, 0.95))
    assert 0.93 <= _coverage(0.3 * 0.05, differences) <= 0.97


def _calibrated(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    logits = rng.normal(size=(n, 6)) * 2.5
    chances = np.exp(metrics.log_probabilities(logits)).cumsum(axis=1)
    return logits, (chances > rng.random((n, 1))).argmax(axis=1)


def test_coverage_of_the_calibration_error_of_a_calibrated_model() -> None:
    rng = np.random.default_rng(6)
    ends, percentile = [], []
    for seed in range(120):
        logits, labels = _calibrated(rng, 500)
        ends.append(intervals.calibration_interval(logits, labels, 15, 200, seed, 0.95))
        percentile.append(metrics.expected_calibration_error(logits, labels, 15))
    assert _coverage(0.0, ends) >= 0.93
    assert min(percentile) > 0.01  # which no calibrated model has: it is the noise of 500 images


def test_coverage_of_the_calibration_error_of_an_overconfident_model() -> None:
    rng = np.random.default_rng(7)
    logits, labels = _calibrated(rng, 400_000)
    truth = metrics.expected_calibration_error(1.6 * logits, labels, 15)
    ends = []
    for seed in range(150):
        logits, labels = _calibrated(rng, 600)
        ends.append(intervals.calibration_interval(1.6 * logits, labels, 15, 200, seed, 0.95))
    assert 0.85 <= _coverage(truth, ends) <= 0.99
    assert all(low > 0 for low, _ in ends)  # it is never taken for calibrated


def test_figures_are_the_same_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    logits, labels = _calibrated(rng, 150)
    whole = intervals.figures(logits, labels, Evaluate())
    monkeypatch.setattr(intervals, "CHUNK", 1000)
    assert intervals.figures(logits, labels, Evaluate()) == whole
    assert intervals.figures(logits, labels, Evaluate(seed=2)) != whole


def test_each_figure_lies_in_its_interval_and_no_images_give_none() -> None:
    logits, labels = _calibrated(np.random.default_rng(9), 300)
    found = intervals.figures(logits, labels, Evaluate())
    for name in ("top1", "top5", "macro_f1", "nll", "ece"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"], name
    empty = intervals.figures(logits[:0], labels[:0], Evaluate())
    assert empty.pop("count") == 0
    assert np.isnan(list(empty.values())).all()


def test_gain_of_a_model_over_itself_is_exactly_nothing() -> None:
    logits, labels = _calibrated(np.random.default_rng(10), 100)
    assert intervals.gain(logits, logits, labels, Evaluate()) == {"top1": 0, "top1_low": 0, "top1_high": 0, "p": 1}
