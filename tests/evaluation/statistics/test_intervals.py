"""Intervals cover the truth as often as they say, and the exact test errs as often as it says."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from stages.evaluation import metrics
from stages.evaluation.statistics import bootstrap, intervals
from stages.params.evaluate import Evaluate
from tests.evaluation import figures


def test_wilson_is_the_score_interval() -> None:
    hits, n = np.array([0, 1, 7, 50, 99, 100]), np.array([10, 10, 8, 100, 100, 100])
    low, high = intervals.wilson(hits, n, 0.95)
    for i in range(len(n)):
        expected = stats.binomtest(int(hits[i]), int(n[i])).proportion_ci(0.95, method="wilson")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert np.isnan(intervals.wilson(0, 0, 0.95)).all()


def test_newcombe_is_that_of_the_paper() -> None:
    # Newcombe 1998, table II, (a) and (h): 56 of 70 against 48 of 80, and 10 of 10 against 0 of 10.
    low, high = intervals.newcombe([56, 10], [70, 10], [48, 0], [80, 10], 0.95)
    assert low == pytest.approx([0.0524, 0.6075], abs=5e-5)
    assert high == pytest.approx([0.3339, 1.0], abs=5e-5)
    assert np.isnan(intervals.newcombe(1, 2, 0, 0, 0.95)).all()


def test_mcnemar_is_the_exact_binomial_test() -> None:
    rng = np.random.default_rng(1)
    for n, share in ((1, 0.5), (20, 0.5), (300, 0.4), (2000, 0.55)):
        one, other = rng.random(n) < 0.8, rng.random(n) < share
        won, lost = int((one & ~other).sum()), int((~one & other).sum())
        expected = [
            stats.binomtest(won, won + lost, alternative=side).pvalue if won + lost else 1.0
            for side in ("greater", "less", "two-sided")
        ]
        better, worse = (intervals.paired_p(*both, n, 0, 0.05) for both in ((won, lost), (lost, won)))
        assert (better, worse, intervals.mcnemar_p(one, other)) == pytest.approx(tuple(expected), rel=1e-9)


def test_mcnemar_of_identical_models_says_nothing() -> None:
    right = np.array([True, False, True])
    assert intervals.mcnemar_p(right, right) == intervals.paired_p(0, 0, 3, 0, 0.05) == 1


def test_mcnemar_errs_at_most_as_often_as_it_says() -> None:
    tosses = np.random.default_rng(2).binomial(700, 0.12, 20_000)
    won = np.random.default_rng(3).binomial(tosses, 0.5)
    p = stats.binom.sf(won - 1, tosses, 0.5)  # as paired_p has it with a margin of 0
    pairs = zip(won[:50].tolist(), tosses[:50].tolist(), strict=True)
    assert p[:50].tolist() == [intervals.paired_p(w, n - w, 700, 0, 0.05) for w, n in pairs]
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
    found = bootstrap.macro_f1_interval(confusion, 4000, 1, 0.9)
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
    ends = [bootstrap.macro_f1_interval(drawn, 200, seed, 0.95) for seed, drawn in enumerate(draws)]
    assert 0.89 <= _coverage(truth, ends) <= 0.99


def _coverage(truth: float, ends: list[bootstrap.Interval]) -> float:
    return float(np.mean([low <= truth <= high for low, high in ends]))


def test_coverage_of_a_skewed_mean_and_of_paired_differences() -> None:
    rng = np.random.default_rng(5)
    ends = [bootstrap.mean_interval(rng.exponential(size=500), 300, seed, 0.95) for seed in range(400)]
    assert 0.92 <= _coverage(1.0, ends) <= 0.98
    losses = []
    for seed in range(400):  # seldom not about 0, and then far from it, to either side
        drawn = rng.normal(0.02, 0.05, 500) + 2 * (rng.random(500) < 0.1) * rng.normal(size=500)
        losses.append(bootstrap.difference_intervals(drawn[:, None], 300, seed, 0.95)[0])
    assert 0.92 <= _coverage(0.02, losses) <= 0.98


def test_differences_have_an_interval_about_their_mean_as_students_on_normal_ones() -> None:
    values = np.random.default_rng(23).normal([0, 5], 1, size=(60, 2))
    for column, (low, high) in zip(values.T, bootstrap.difference_intervals(values, 20_000, 1, 0.95), strict=True):
        expected = stats.ttest_1samp(column, 0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03)
    assert bootstrap.difference_intervals(np.full((9, 1), 0.3), 100, 1, 0.95) == [pytest.approx((0.3, 0.3))]
    # Two images: half of the resamples are of one of them, and do not tell how far they are apart.
    assert np.isnan(bootstrap.difference_intervals(np.array([[0.0], [1.0]]), 100, 1, 0.95)[0]).all()


def _calibrated(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    logits = rng.normal(size=(n, 6)) * 2.5
    chances = np.exp(metrics.log_probabilities(logits)).cumsum(axis=1)
    return logits, (chances > rng.random((n, 1))).argmax(axis=1)


def _calibration_interval(
    logits: np.ndarray, labels: np.ndarray, bins: int, draws: int, seed: int, confidence: float
) -> bootstrap.Interval:
    said = metrics.image_scores(logits, labels)
    return intervals.calibration_interval(said.confidence, said.correct, bins, draws, seed, confidence)


def test_coverage_of_the_calibration_error_of_a_calibrated_model() -> None:
    rng = np.random.default_rng(6)
    ends, percentile = [], []
    for seed in range(120):
        logits, labels = _calibrated(rng, 500)
        ends.append(_calibration_interval(logits, labels, 15, 200, seed, 0.95))
        percentile.append(figures.expected_calibration_error(logits, labels, 15))
    assert _coverage(0.0, ends) >= 0.93
    assert min(percentile) > 0.01  # which no calibrated model has: it is the noise of 500 images


def test_coverage_of_the_calibration_error_of_an_overconfident_model() -> None:
    rng = np.random.default_rng(7)
    logits, labels = _calibrated(rng, 400_000)
    truth = figures.expected_calibration_error(1.6 * logits, labels, 15)
    ends = []
    for seed in range(150):
        logits, labels = _calibrated(rng, 600)
        ends.append(_calibration_interval(1.6 * logits, labels, 15, 200, seed, 0.95))
    assert 0.85 <= _coverage(truth, ends) <= 0.99
    assert all(low > 0 for low, _ in ends)  # it is never taken for calibrated


def test_figures_are_the_same_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    logits, labels = _calibrated(rng, 150)
    whole = intervals.figures(logits, labels, Evaluate())
    monkeypatch.setattr(bootstrap, "CHUNK", 1000)
    monkeypatch.setattr(metrics, "CHUNK", 100)
    # To the last bits of sums, which a product of matrices takes in another order.
    assert intervals.figures(logits, labels, Evaluate()) == pytest.approx(whole, rel=1e-12)
    assert intervals.figures(logits, labels, Evaluate(seed=2)) != whole


FIGURES = ("top1", "top5", "macro_f1", "balanced_accuracy", "worst_class_recall", "nll", "brier", "ece", "aurc",
           "selective_top1_80")  # fmt: skip


def test_each_figure_lies_in_its_interval_and_no_images_give_none() -> None:
    logits, labels = _calibrated(np.random.default_rng(9), 300)
    found = intervals.figures(logits, labels, Evaluate())
    for name in FIGURES:
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"], name
    empty = intervals.figures(logits[:0], labels[:0], Evaluate())
    assert empty.keys() == found.keys()
    assert empty.pop("count") == 0
    assert np.isnan(list(empty.values())).all()


def test_figures_are_those_of_the_metrics() -> None:
    logits, labels = _calibrated(np.random.default_rng(14), 200)
    found = intervals.figures(2 * logits, labels, Evaluate())
    confusion = metrics.confusion_matrix(labels, metrics.predicted_classes(logits), 6)
    recall = metrics.per_class(confusion).recall
    expected = {
        "top1": figures.top_k_accuracy(logits, labels, 1),
        "top5": figures.top_k_accuracy(logits, labels, 5),
        "macro_f1": metrics.macro_f1(confusion),
        "balanced_accuracy": metrics.balanced_accuracy(confusion),
        "worst_class_recall": np.nanmin(recall),
        "nll": figures.negative_log_likelihood(2 * logits, labels),
        "brier": figures.brier(2 * logits, labels),
        "ece": figures.expected_calibration_error(2 * logits, labels, 15),
        "ece_debiased": figures.debiased_ece(2 * logits, labels, 15),
        "aurc": figures.aurc(2 * logits, labels),
        "selective_top1_80": figures.selective_accuracy(2 * logits, labels).accuracy[159],
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_logits_that_are_no_probabilities_have_no_figures_of_probabilities() -> None:
    logits, labels = _calibrated(np.random.default_rng(13), 60)
    whole = intervals.figures(logits, labels, Evaluate())
    found = intervals.figures(logits, labels, Evaluate(), calibrated=False)
    assert found.keys() == whole.keys()
    for name, value in found.items():
        if name.startswith(("nll", "brier", "ece", "aurc", "selective")):
            assert np.isnan(value), name
        else:
            assert value == whole[name], name


@pytest.mark.parametrize("right", [0, 1], ids=["all wrong", "all right"])
@pytest.mark.parametrize("images", [1, 2, 40])
def test_degenerate_answers_have_intervals_within_what_is_possible(images: int, right: int) -> None:
    labels = np.arange(images) % 2
    logits = 5.0 * np.eye(7)[labels if right else labels + 1]
    found = intervals.figures(logits, labels, Evaluate())
    assert not np.isnan(list(found.values())).any()
    for name in FIGURES:
        assert found[f"{name}_low"] <= found[name] + 1e-12 and found[name] <= found[f"{name}_high"] + 1e-12, name
        assert found[f"{name}_low"] >= 0
        assert found[f"{name}_high"] <= (np.inf if name == "nll" else 2 if name == "brier" else 1)
    # Not even forty of forty make sure that the next one is right too.
    for name in ("top1", "balanced_accuracy", "worst_class_recall", "selective_top1_80"):
        assert found[name] == right
        assert found[f"{name}_high"] - found[f"{name}_low"] > 0.05, name


def test_resamples_count_every_image_as_often_as_chance_has_it() -> None:
    counts = bootstrap.resampled(50, 400, 1, lambda drawn: drawn)
    assert (counts.sum(axis=1) == 50).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(50), abs=0.25)  # 5 standard errors
    assert counts.var() == pytest.approx(1 - 1 / 50, rel=0.05)


def test_bca_is_that_of_scipy() -> None:
    values = np.random.default_rng(15).exponential(size=80) ** 2
    found = bootstrap.mean_interval(values, 20_000, 1, 0.95)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", random_state=2).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), rel=0.02)
    percentile = np.quantile(bootstrap.resampled(80, 20_000, 1, lambda drawn: drawn @ values[:, None] / 80), 0.975)
    assert found.high > 1.03 * percentile  # what it is for


def test_the_cells_of_a_confusion_matrix_are_drawn_alike_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image after the other where cells are many, else a multinomial: means and covariances agree."""
    counts = np.array([30, 12, 5, 3])
    few = bootstrap.cell_draws(counts, 20_000, 1, lambda drawn: drawn[:, 0] - drawn[:, 1] * 1.0)
    many = bootstrap.cell_draws(np.repeat(1, 50), 20_000, 1, lambda d: d[:, :30].sum(1) - d[:, 30:42].sum(1))
    assert few.mean() == pytest.approx(many.mean(), abs=0.3)
    assert few.std() == pytest.approx(many.std(), rel=0.03)


def test_draws_of_accuracy_against_coverage_are_those_of_images_drawn_again() -> None:
    """Counts in order of confidence against the metrics themselves, on images that tie."""
    rng = np.random.default_rng(16)
    confident, correct = np.sort(rng.choice([0.2, 0.5, 0.6, 0.9], 30))[::-1], rng.random(30) < 0.6
    found = bootstrap.selective_draws(confident, correct, 0.8, 50, 3)
    counts = bootstrap.resampled(30, 50, 3, lambda drawn: drawn).astype(int)
    for row, (area, share) in zip(counts, found, strict=True):
        curve = metrics.selective_curve(np.repeat(confident, row), np.repeat(correct, row))
        assert (area, share) == pytest.approx((metrics.risk_coverage_area(curve), metrics.accuracy_at(curve, 0.8)))


def test_the_influence_on_the_area_is_its_derivative() -> None:
    rng = np.random.default_rng(17)
    confident, correct = rng.random(2000), rng.random(2000) < 0.7
    influence = bootstrap.risk_coverage_influence(confident, correct)
    order = np.argsort(-confident, kind="stable")
    before = metrics.risk_coverage_area(metrics.selective_curve(confident, correct))
    for place in (5, 300, 1200, 1999):
        twice = np.append(order, order[place])
        after = metrics.risk_coverage_area(metrics.selective_curve(confident[twice], correct[twice]))
        assert 2001 * (after - before) == pytest.approx(influence[place], abs=0.06)


def test_accuracy_on_the_surest_images_is_less_sure_than_as_many_images_are() -> None:
    """Coverage where the accuracy falls steeply at the edge, so that it matters which images are kept."""
    rng = np.random.default_rng(24)
    plain = own = 0
    for seed in range(400):
        confident = rng.random(500)
        correct = rng.random(500) < np.where(confident > 0.5, 0.97, 0.3)
        _, (low, high) = intervals.selective_intervals(confident, correct, 0.8, 200, seed, 0.95)
        low_plain, high_plain = intervals.wilson(
            metrics.accuracy_at(metrics.selective_curve(confident, correct), 0.8) * 400, 400, 0.95
        )
        own += int(low <= 0.71875 <= high)
        plain += int(low_plain <= 0.71875 <= high_plain)
    assert plain < 372 < own < 394
    # None of the surest is wrong: Wilson's of as many images.
    _, found = intervals.selective_intervals(np.arange(100.0), np.arange(100) > 20, 0.4, 200, 1, 0.95)
    assert found == pytest.approx([float(end) for end in intervals.wilson(40, 40, 0.95)])


def test_balanced_accuracy_with_classes_alike_is_as_sure_as_accuracy() -> None:
    confusion = np.full((4, 4), 10) + np.diag([60] * 4)
    low, high = intervals.balanced_accuracy_interval(confusion, 0.95)
    assert (low, high) == pytest.approx([float(end) for end in intervals.wilson(280, 400, 0.95)], abs=1e-3)
    # A rare class makes the mean of both less sure than the many images of the other do.
    low, high = intervals.balanced_accuracy_interval(np.array([[900, 100], [2, 8]]), 0.95)
    assert high - low > 0.2
    one_each = intervals.balanced_accuracy_interval(np.array([[1, 0], [1, 0]]), 0.95)
    assert one_each.low < 0.2 and one_each.high > 0.8
    assert np.isnan(intervals.balanced_accuracy_interval(np.zeros((2, 2), int), 0.95)).all()


def test_the_worst_of_many_is_corrected_for_having_been_picked() -> None:
    """A hundred classes alike: the lowest is low by chance alone."""
    rng = np.random.default_rng(18)
    support = np.full(100, 20)
    plain, corrected = 0, 0
    for _ in range(1000):
        hits = rng.binomial(support, 0.8)
        low, high = intervals.worst_interval(hits, support, 0.95)
        plain += int(intervals.wilson(hits.min(), 20, 0.95)[1] >= 0.8)
        corrected += int(low <= 0.8 <= high)
    assert plain < 100
    assert corrected >= 935
    alone = intervals.worst_interval(np.array([7]), np.array([10]), 0.95)
    assert alone == pytest.approx(tuple(stats.binomtest(7, 10).proportion_ci(0.95, method="exact")))
    assert intervals.worst_interval(np.array([0, 7]), np.array([0, 10]), 0.95) == alone  # no image, no group
    assert np.isnan(intervals.worst_interval(np.array([0]), np.array([0]), 0.95)).all()


def test_intervals_of_classes_hold_their_figures_and_cover() -> None:
    rng = np.random.default_rng(19)
    chances = np.array([[0.3, 0.05, 0.02], [0.04, 0.25, 0.04], [0.1, 0.05, 0.15]])
    truth = metrics.per_class((chances * 10_000).astype(int))
    covered = {"recall": 0, "precision": 0, "f1": 0}
    for _ in range(500):
        confusion = rng.multinomial(200, chances.ravel()).reshape(3, 3)
        found, figures = intervals.class_intervals(confusion, 0.95), metrics.per_class(confusion)
        for name in covered:
            low, high = getattr(found, f"{name}_low"), getattr(found, f"{name}_high")
            assert ((low <= getattr(figures, name)) & (getattr(figures, name) <= high)).all()
            covered[name] += ((low <= getattr(truth, name)) & (getattr(truth, name) <= high)).sum()
    assert all(0.93 <= count / 1500 <= 0.97 for count in covered.values()), covered


def test_intervals_of_classes_are_defined_where_their_figures_are() -> None:
    confusion = np.array([[3, 2, 0, 0], [0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]])
    found, figures = intervals.class_intervals(confusion, 0.95), metrics.per_class(confusion)
    for name in ("recall", "precision", "f1"):
        for end in ("low", "high"):
            assert (np.isnan(getattr(found, f"{name}_{end}")) == np.isnan(getattr(figures, name))).all()
    assert found.f1_low[2] == 0 and 0 < found.f1_high[2] < 1


def test_gain_of_a_model_over_itself_is_exactly_nothing() -> None:
    logits, labels = _calibrated(np.random.default_rng(10), 100)
    found = intervals.gain(logits, logits, labels, Evaluate())
    assert found.pop("p") == 1
    names = ("top1", "top5", "macro_f1", "nll", "brier")
    assert set(found) == {f"{name}{end}" for name in names for end in ("", "_low", "_high")}
    assert {found[name] for name in names} == {0}
    assert {found[f"{name}{end}"] for name in ("macro_f1", "nll", "brier") for end in ("_low", "_high")} == {0}
    # A hundred images that both have right or wrong do not show that the next hundred are so too.
    assert -0.05 < found["top1_low"] < -0.03 and 0.03 < found["top1_high"] < 0.05


def test_gain_is_above_nothing_where_the_first_model_is_better() -> None:
    rng = np.random.default_rng(20)
    logits, labels = _calibrated(rng, 600)
    worse = logits + 2.5 * rng.normal(size=logits.shape)
    better, other = (intervals.figures(each, labels, Evaluate()) for each in (logits, worse))
    found, back = intervals.gain(logits, worse, labels, Evaluate()), intervals.gain(worse, logits, labels, Evaluate())
    for name in ("top1", "macro_f1", "nll", "brier"):
        assert 0 < found[f"{name}_low"] < found[name] < found[f"{name}_high"], name
        sign = -1 if name in ("nll", "brier") else 1
        assert found[name] == pytest.approx(sign * (better[name] - other[name]))
        assert back[name] == pytest.approx(-found[name])
    assert found["p"] < 0.001


def test_gain_over_what_claims_no_probabilities_and_on_no_images() -> None:
    logits, labels = _calibrated(np.random.default_rng(21), 80)
    found = intervals.gain(logits, logits[:, ::-1], labels, Evaluate(), calibrated=False)
    assert [name for name, value in found.items() if np.isnan(value)] == [
        "nll", "nll_low", "nll_high", "brier", "brier_low", "brier_high"
    ]  # fmt: skip
    empty = intervals.gain(logits[:0], logits[:0], labels[:0], Evaluate())
    assert empty.keys() == found.keys()
    assert empty.pop("p") == 1
    assert np.isnan(list(empty.values())).all()


def test_coverage_of_a_paired_difference_of_macro_f1() -> None:
    rng = np.random.default_rng(22)
    base, change = rng.normal(size=(200_000, 10)) * 2, rng.normal(size=(200_000, 10))
    labels = (base + 3 * rng.normal(size=base.shape)).argmax(axis=1)
    one, other = base.argmax(axis=1), (base + change).argmax(axis=1)
    scores = [metrics.macro_f1(metrics.confusion_matrix(labels, each, 10)) for each in (one, other)]
    parts = np.arange(200_000).reshape(400, 500)
    ends = [
        bootstrap.macro_f1_difference_interval(labels[rows], one[rows], other[rows], 10, 200, seed, 0.95)
        for seed, rows in enumerate(parts)
    ]
    assert 0.92 <= _coverage(scores[0] - scores[1], ends) <= 0.98
