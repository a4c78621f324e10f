"""The card: whoever sees only this page can decide. And the page that compares two versions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stages.evaluation.gate import judge
from stages.evaluation.predictions import VersionPredictions, no_predictions
from stages.params.gate import Gate
from stages.registry.card.comparison import FIGURES, figure_rows
from stages.registry.card.model_card import (
    MOST_CHARACTERS,
    ROOM_FOR_COMMIT,
    SECOND_PART,
    render_card,
    with_verdict,
)
from stages.registry.card.review_page import changed_images, render_review
from stages.registry.gate_review import BatchCounts, Candidate, Review
from stages.registry.versions import COMMIT_TO_COME

COMPARE = "/#/compare-runs?runs=1,2"
LINKS = {"run": "/#/runs/1", "evaluation report": "/#/runs/1/artifacts/report.html"}


def _answers(name: str, correct: np.ndarray, fresh: int, classes: int, batches: int) -> VersionPredictions:
    n = len(correct)
    split = np.where(np.arange(n) < n - fresh, "test", "fresh")
    names = np.array([f"{'delivery' * 6}-{i:03d}" for i in range(batches)])[np.arange(n) % batches]
    labels = np.arange(n) % classes
    predicted = np.where(correct, labels, (labels + 1) % classes)
    return VersionPredictions(
        name, tuple(f"k{i:06d}" for i in range(n)), split, np.where(split == "test", "t", names), labels, predicted
    )


def review_of(test: int, fresh: int, names: list[str], batches: int = 2, gain: float = 0.05, **values: Any) -> Review:
    """A candidate that is better by `gain` than version 3, which is in force."""
    chance = np.random.default_rng(1).random(test + fresh)
    candidate = _answers("ab" * 32, chance < 0.8 + gain, fresh, len(names), batches)
    in_force = _answers("cd" * 32, (chance < 0.75) | (chance > 0.95), fresh, len(names), batches)
    figures = {"top1": float(candidate.correct[candidate.test].mean()), "worst_class_recall": 0.7, "ece": 0.05}
    verdict = judge(candidate, figures, 45_000_000, 12.0, in_force, Gate(), values.get("decisions", 1), names)
    known = {f"{key}{end}": 0.987 for key in FIGURES for end in ("", "_low", "_high")}
    return Review(verdict, "version 3", candidate, in_force, names, COMPARE, known, known, same_test_set=test < 20_000)


def alone(review: Review) -> Review:
    """Without a version in force."""
    figures = {"top1": float(review.candidate.correct[review.candidate.test].mean()), "worst_class_recall": 0, "ece": 0}
    verdict = judge(review.candidate, figures, 1, 1.0, None, Gate(min_worst_class=0))
    return Review(verdict, "", review.candidate, None, review.classes)


def candidate_of(review: Review, **values: Any) -> Candidate:
    """All else that a card needs."""
    top1 = float(review.candidate.correct[review.candidate.test].mean())
    metrics = {
        "test": {"top1": top1, "top1_low": top1 - 0.02, "top1_high": top1 + 0.02, "top5": 0.99, "ece": 0.05},
        "before": {"top1": 0.6},
        "scratch": {"top1": None},
        "data": {"accepted": 3404, "quarantined": 32},
    }
    drift = [
        {"fact": "brightness", "median": 90.0, "reference_median": 120.5, "drifted": True},
        {"fact": "width", "median": 64.0, "reference_median": 64.0, "drifted": False},
    ]
    found: dict[str, Any] = {
        "sha256": review.candidate.sha256,
        "config": {"architecture": "resnet18", "image_size": 64, "classes": review.classes},
        "metrics": metrics,
        "quarantined": {"decodes": 4, "no_near_duplicate": 28},
        "batches": [
            BatchCounts("target", "finetune", {"train": 900, "test": 1000}),
            BatchCounts("d-one", "finetune", {"fresh": 9}),
        ],
        "confidence": 0.95,
        "git": {"git.commit": "f" * 40},
        "latency_ms": (12.0, 19.0),
        "validation": {"batches": {"target": {"drift": []}, "d-one": {"drift": drift, "accept_drift": None}}},
    }
    return Candidate(**found | values)


CLASSES = ["bell", "cup|mug", "tent", "<b>sofa"]


def test_it_says_what_ingest_understood() -> None:
    review = review_of(1000, 400, CLASSES)
    odd = {
        "layout": "class folders",
        "classes": {"count": 3},
        "left_out": {"hidden": {"files": 4}},
        "odd": ["a|b"] * 99,
    }
    validation = {"order": ["old", "new"], "batches": {"old": {"source": None}, "new": {"source": odd}}}
    card = render_card(candidate_of(review, validation=validation), review, LINKS)
    assert "- `old`: what ingest understood is not recorded" in card
    assert "- `new`: class folders, 3 classes, 4 files left out; **odd:** a\\|b; a\\|b" in card
    assert len(card) < 5000


def test_a_reviewer_who_sees_only_the_card_can_decide() -> None:
    review = review_of(1000, 400, CLASSES, decisions=3)
    card = render_card(candidate_of(review), review, LINKS)
    test = next(each for each in review.verdict.comparisons if each.kind == "test")
    for what in (
        f"**Gate: {review.verdict.result} (against version 3)**",
        f"{100 * test.before / test.images:.1f} % (", f"{100 * test.now / test.images:.1f} % (",  # with intervals
        "| fresh&emsp;| 400&emsp;|", "Decision number 3 on this test set",
        f"fresh of {'delivery' * 2}…", f"({COMPARE})",
        "Classes that gained and lost most", "bell", "cup\\|mug", "&lt;b>sofa",
        "| d-one&emsp;| finetune&emsp;|", "32 quarantined", "| no_near_duplicate&emsp;| 28&emsp;|",
        "Drift in `d-one` (medians): brightness 120.5 → 90.", f"git checkout {'f' * 40} &&", "[run](/#/runs/1)",
    ):  # fmt: skip
        assert what in card, what
    for condition in review.verdict.conditions:
        assert f"| {condition.name}&emsp;|" in card
        assert f"{condition.detail}&emsp;|" in card
    assert "width" not in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_the_figures_of_both_versions_stand_side_by_side() -> None:
    now: dict[str, float | None] = {"top1": 0.85, "worst_class_recall": 0.7, "macro_f1": 0.851}
    now |= {
        "macro_f1_low": 0.83,
        "macro_f1_high": 0.872,
        "ece": 0.05,
        "ece_low": 0.04,
        "ece_high": 0.06,
        "nll": None,
        "latency_ms": 12.04,
        "size_mb": 44.8,
    }
    before = {"top1": 0.8, "worst_class_recall": 0.61, "macro_f1": 0.8, "nll": 0.71, "latency_ms": 15.0}
    review = replace(review_of(1000, 400, CLASSES), figures=now, figures_in_force=before)
    rows = [
        ("recall of the worst class, %", "61.0", "70.0"), ("macro-F1, %", "80.0", "85.1 (83.0 – 87.2)"),
        ("ECE", "–", "0.050 (0.040 – 0.060)"), ("NLL", "0.710", "–"),
        ("one image when registered, ms", "15.0", "12.0"), ("weights, MB", "–", "44.8"),
    ]  # fmt: skip
    assert [tuple(row.values()) for row in figure_rows(review)] == rows
    card, page = render_card(candidate_of(review), review, LINKS), render_review(review)
    for name, old, new in rows:
        assert f"| {name}&emsp;| {old}&emsp;| {new}&emsp;|" in card
        assert f'<td>{name}</td><td class="n">{old}</td><td class="n">{new}</td>' in page
    assert "own test set" not in card + page
    other = replace(review, same_test_set=False)
    for text in (render_card(candidate_of(other), other, LINKS), render_review(other)):
        assert "figures of version 3 in this table are of its own test set, which is another" in text
    not_compared = replace(review, verdict=replace(review.verdict, comparisons=()))
    assert figure_rows(not_compared)[0] == {"name": "top-1, %", "before": "80.0", "now": "85.0"}
    assert figure_rows(alone(review)) == []


def test_the_first_model_has_a_card_too() -> None:
    review = alone(review_of(1000, 0, CLASSES))
    card = render_card(candidate_of(review), review, LINKS)
    assert card.startswith("**Gate: passed (floors only: no version was in force)**")
    assert "Weakest classes" in card
    assert "gained" not in card
    assert "The first decision on this test set" in card
    later = replace(review, verdict=replace(review.verdict, decisions=2))
    assert "Decision number 2 on this test set" in render_card(candidate_of(later), later, LINKS)
    assert "luck" not in render_card(candidate_of(later), later, LINKS)
    page = render_review(review)
    assert "no version to compare with" in page


def test_a_card_without_a_comparison_does_not_claim_one() -> None:
    review = review_of(1000, 0, CLASSES)
    figures = {"top1": float(review.candidate.correct.mean()), "worst_class_recall": 1, "ece": 0}
    verdict = judge(review.candidate, figures, 1, 1.0, no_predictions("cd" * 32), Gate())
    review = replace(review, verdict=verdict, in_force=no_predictions("cd" * 32))
    for page in (render_card(candidate_of(review), review, LINKS), render_review(review)):
        assert "Version 3 could not be compared with" in page
        assert "test set differs" in page
        assert "on the same images" not in page


def test_images_of_classes_that_the_version_in_force_does_not_know_are_said_to_count_against_it() -> None:
    review = review_of(1000, 400, CLASSES)
    assert review.in_force
    for classes, said in ((3, "350 are of classes that it does not know ("), (4, ""), (None, "")):
        told = replace(review, in_force=replace(review.in_force, classes=classes))
        for page in (render_card(candidate_of(told), told, LINKS), render_review(told)):
            assert ("does not know" in page) == bool(said)
            assert said in page
    assert "(cup|mug and 2 more)" in replace(review, in_force=replace(review.in_force, classes=1)).note


@pytest.mark.parametrize("git", [{}, {"git.commit": "f" * 40, "git.dirty": "true"}, {"git.commit": COMMIT_TO_COME}])
@pytest.mark.parametrize("first", [True, False])
def test_a_card_fits_into_mlflow_whatever_there_is_to_tell(git: dict[str, str], first: bool) -> None:
    names = [f"n{i:08d} a class | with a name as long as those of ImageNet, and synonyms" for i in range(1000)]
    review = review_of(20_000, 4000, names, batches=40, gain=-0.1, decisions=10_000)
    review = alone(review) if first else review
    facts = [
        {"fact": fact, "median": 123456.789, "reference_median": 98765.4, "drifted": True}
        for fact in ("brightness", "contrast", "width", "height", "bytes")
    ]
    many = [
        BatchCounts(f"{'batch' * 12}-{n}", "finetune", dict.fromkeys(("train", "val", "test"), 10**6))
        for n in range(40)
    ]
    drift = {each.name: {"drift": facts, "accept_drift": "because " * 99} for each in many}
    candidate = candidate_of(
        review, git=git, batches=many, quarantined={f"{'reason' * 60}-{n}": n for n in range(100)},
        validation={"batches": drift},
    )  # fmt: skip
    links = {f"link {n}": f"/#/experiments/{'1' * 20}/runs/{'2' * 32}/artifacts/{'n' * 60}/r.html" for n in range(4)}
    card = render_card(candidate, review, links)
    assert len(card.replace(COMMIT_TO_COME, "f" * 40)) <= MOST_CHARACTERS
    first_part, _, second = card.partition(SECOND_PART)
    for condition in review.verdict.conditions:
        assert condition.detail.replace("|", "\\|") in first_part
    assert all(f"]({link})" in second for link in links.values())
    assert "39 earlier" in second or "36 earlier" in second


def test_what_does_not_fit_at_all_is_cut_behind_the_verdict() -> None:
    review = review_of(1000, 400, CLASSES)
    card = render_card(candidate_of(review), review, {"run": "x" * 6000})
    assert len(card) <= MOST_CHARACTERS - ROOM_FOR_COMMIT
    assert card.endswith("There is more than fits here: see the run.\n")
    assert all(condition.detail in card for condition in review.verdict.conditions)


def test_a_gate_taken_again_changes_the_verdict_and_nothing_else() -> None:
    review = review_of(1000, 400, CLASSES)
    card = render_card(candidate_of(review), review, LINKS)
    assert with_verdict(card, review) == card
    worse = review_of(1000, 400, CLASSES, gain=-0.1)
    again = with_verdict(card, replace(worse, against="version 4"))
    assert again.startswith("**Gate: failed (against version 4)**")
    assert again.partition(SECOND_PART)[1:] == card.partition(SECOND_PART)[1:]
    assert "version 3" not in again
    by_hand = with_verdict("A person's own words.", review)
    assert by_hand.startswith("**Gate:")
    assert by_hand.endswith("A person's own words.")


def test_the_comparison_page_shows_both_versions_image_by_image_and_nothing_from_elsewhere() -> None:
    review = review_of(1000, 400, CLASSES)
    page = render_review(review)
    assert "http" not in page
    assert "<b>sofa" not in page
    assert "&lt;b&gt;sofa" in page
    changed = changed_images(review)
    test, fresh = review.verdict.comparisons[:2]
    assert len(changed["won"]) == test.won + fresh.won
    assert len(changed["lost"]) == test.lost + fresh.lost
    assert f"{len(changed['won']):,} images that only the candidate has right" in page
    row = changed["won"][0]
    assert row["now"] == row["is"] != row["before"]


def test_fresh_images_under_another_label_are_not_among_those_that_changed() -> None:
    review = review_of(1000, 400, CLASSES)
    assert review.in_force
    labels = np.where(review.in_force.test, review.in_force.labels, (review.in_force.labels + 1) % len(CLASSES))
    in_force = replace(review.in_force, labels=labels)
    figures = {"top1": float(review.candidate.correct[review.candidate.test].mean())}
    verdict = judge(review.candidate, figures, 1, 1.0, in_force, Gate())
    test, fresh = verdict.comparisons[:2]
    changed = changed_images(replace(review, verdict=verdict, in_force=in_force))
    assert fresh.images == 0
    assert (len(changed["won"]), len(changed["lost"])) == (test.won, test.lost)


def test_a_class_that_the_candidate_does_not_know_has_a_number() -> None:
    review = review_of(1000, 0, CLASSES)
    assert review.in_force
    strange = replace(review, in_force=replace(review.in_force, predicted=review.in_force.predicted + 4))
    assert {row["before"] for row in changed_images(strange)["won"]} == {f"class {i}" for i in range(4, 8)}
