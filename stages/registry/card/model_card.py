"""The model card: a version's description in MLflow.

MLflow's version page shows neither metrics nor plots, so the card carries the figures. It is Markdown with tables, and
at most 5,000 characters long: more does not fit into MLflow's own column on PostgreSQL. So its tables shrink until all
fits. The verdict with the comparison comes first, and whatever is too long, it is never cut.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.evaluation.predictions import VersionPredictions
from stages.evaluation.statistics.intervals import wilson
from stages.pages import templates
from stages.pages.text import percent, percent_range, shortened
from stages.registry.card.comparison import comparison_rows, figure_rows, with_interval
from stages.registry.gate_review import BatchCounts, Candidate, Review, class_name

MOST_CHARACTERS = 5000
ROOM_FOR_COMMIT = 100
"""Kept free: a commit that is named later is longer than what stands in for it until then."""
ROWS = (6, 4, 3, 2, 1)
"""Of every table whose length depends on the data: the most that fits is taken."""
SECOND_PART = "### This model\n"
"""Begins what stays of a card when the gate is taken again."""
CUT = "\n\nThere is more than fits here: see the run.\n"
SPLITS = ("train", "val", "test", "fresh")
SIGNS = {"passed": "✓ passed", "failed": "✗ **failed**", "inconclusive": "? inconclusive"}


def render_card(candidate: Candidate, review: Review, links: Mapping[str, str]) -> str:
    """The card in Markdown. `links` are label to address, relative ones within MLflow's UI."""
    return _fit([(_verdict_part(review, rows), _model_part(candidate, review, links, rows)) for rows in ROWS])


def with_verdict(card: str, review: Review) -> str:
    """The same card with its first part, verdict and comparison, made anew; all else as it was."""
    second = card[max(0, card.find(SECOND_PART)) :]
    return _fit([(_verdict_part(review, rows), second) for rows in ROWS])


def _fit(choices: Sequence[tuple[str, str]]) -> str:
    """The first choice that is short enough; else the last, its second part cut at the end of a line."""
    most = MOST_CHARACTERS - ROOM_FOR_COMMIT
    for first, second in choices:
        if len(first) + 1 + len(second) <= most:
            return f"{first}\n{second}"
    return f"{first}\n{second}"[: most - len(CUT)].rsplit("\n", 1)[0] + CUT


# ----------------------------------------------------------------------------------------------- verdict, comparison


def _verdict_part(review: Review, rows: int) -> str:
    overall, classes, batches = comparison_rows(review.verdict)
    batches.sort(key=lambda row: row["points"])
    ranked = sorted((row for row in classes if row["points"]), key=lambda row: row["points"])
    lost, gained = [row for row in ranked if row["points"] < 0], [row for row in ranked[::-1] if row["points"] > 0]
    test = review.candidate.correct[review.candidate.test]
    low, high = wilson(test.sum(), len(test), 1 - review.verdict.alpha)
    values = {
        "review": review,
        "confidence": percent(1 - review.verdict.alpha, 0),
        "overall": overall,
        "batches": batches[:rows],
        "more_batches": len(batches[rows:]),
        "figures": figure_rows(review),
        "alone": {"images": f"{len(test):,}", "now": with_interval(test.mean(), float(low), float(high))},
        "conditions": [(each, SIGNS[each.result]) for each in review.verdict.conditions],
        "changes": [*gained[:rows], *lost[:rows][::-1]],
        "weakest": weakest_classes(review.candidate, review.classes, rows),
        "gained": len(gained),
        "lost": len(lost),
        "classes": len(classes),
    }
    return _markdown("verdict.md.j2", values)


def weakest_classes(answers: VersionPredictions, classes: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The classes of lowest recall on `test`, the worst first: name, recall, images, and what they were taken for."""
    labels, predicted = answers.labels[answers.test], answers.predicted[answers.test]
    images = np.bincount(labels, minlength=len(classes))
    recall = np.bincount(labels[predicted == labels], minlength=len(classes)) / np.maximum(images, 1)
    worst = [label for label in np.argsort(recall, kind="stable").tolist() if images[label]][:count]
    return [
        {
            "name": classes[label],
            "recall": percent(recall[label]),
            "images": f"{images[label]:,}",
            "taken_for": _taken_for(predicted[(labels == label) & (predicted != label)], classes),
        }
        for label in worst
    ]


def _taken_for(predicted: np.ndarray, classes: Sequence[str]) -> str:
    return class_name(classes, int(np.bincount(predicted).argmax())) if len(predicted) else "–"


# ------------------------------------------------------------------------------------------------ the model itself


def _model_part(candidate: Candidate, review: Review, links: Mapping[str, str], rows: int) -> str:
    reasons = sorted(candidate.quarantined.items(), key=lambda item: (-item[1], item[0]))
    test = candidate.metrics.get("test", {})
    values = {
        "heading": SECOND_PART.strip(),
        "confidence": percent(candidate.confidence, digits=0),
        "test_images": f"{int(review.candidate.test.sum()):,}",
        "accuracy": _accuracy_rows(candidate.metrics),
        "figures": _figures(test),
        "architecture": candidate.config["architecture"],
        "image_size": candidate.config["image_size"],
        "classes": f"{len(candidate.config['classes']):,}",
        "latency": "median {:.1f} ms, 95 % within {:.1f} ms".format(*candidate.latency_ms),
        "reproduce": _reproduce(candidate.git),
        "links": list(links.items()),
        "batches": _batch_rows(candidate.batches, rows),
        "quarantine_line": _quarantine_line(candidate.metrics.get("data", {})),
        "quarantined": [{"reason": reason, "images": f"{n:,}"} for reason, n in reasons[:rows]],
        "more_reasons": len(reasons[rows:]),
        "drift": _drift_lines(candidate.validation.get("batches", {}), rows),
    }
    return _markdown("model_card.md.j2", values)


def _accuracy_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    labels = {
        "before": "before fine-tuning (frozen backbone, nearest class mean)",
        "test": "**fine-tuned: this model**",
        "scratch": "from scratch (same recipe)",
    }
    found = [(label, metrics.get(part) or {}) for part, label in labels.items()]
    return [
        {"label": label, "top1": percent(part["top1"]), "interval": _interval(part)}
        for label, part in found
        if part.get("top1") is not None
    ]


def _interval(part: Mapping[str, Any]) -> str:
    low, high = part.get("top1_low"), part.get("top1_high")
    return "" if low is None or high is None else percent_range(low, high)


def _figures(test: Mapping[str, Any]) -> str:
    shares = {"top5": "top-5", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}
    parts = [f"{label} {percent(test[key])}" for key, label in shares.items() if test.get(key) is not None]
    parts += [f"{key.upper()} {test[key]:.3f}" for key in ("ece", "nll") if test.get(key) is not None]
    return ", ".join(parts)


def _batch_rows(batches: Sequence[BatchCounts], rows: int) -> list[dict[str, str]]:
    """The newest, one by one, and the sum of all before them."""
    newest, earlier = batches[-rows:], batches[:-rows]
    shown = [{"batch": each.name, "role": each.role, **_counts(each.counts)} for each in newest]
    if earlier:
        total = {split: sum(each.counts.get(split, 0) for each in earlier) for split in SPLITS}
        shown.insert(0, {"batch": f"{len(earlier):,} earlier", "role": "", **_counts(total)})
    return shown


def _counts(counts: Mapping[str, int]) -> dict[str, str]:
    return {split: f"{counts[split]:,}" if counts.get(split) else "–" for split in SPLITS}


def _quarantine_line(data: Mapping[str, Any]) -> str:
    if data.get("accepted") is None:
        return ""
    return f"{data['accepted']:,} images accepted, {data['quarantined']:,} quarantined."


def _drift_lines(batches: Mapping[str, Any], rows: int) -> list[str]:
    """A line per batch that looks different from all before it, and how many do not."""
    compared = {name: batch["drift"] for name, batch in batches.items() if batch.get("drift")}
    if not compared:
        return ["Drift: no batch has an earlier one to compare with."]
    drifted = {name: [fact for fact in facts if fact["drifted"]] for name, facts in compared.items()}
    guilty = [name for name, facts in drifted.items() if facts]
    lines = []
    for name in guilty[-rows:]:
        facts = ", ".join(f"{f['fact']} {f['reference_median']:g} → {f['median']:g}" for f in drifted[name])
        excuse = batches[name].get("accept_drift")
        accepted = f"; accepted: {shortened(excuse, 80)}" if excuse else ""
        lines.append(f"Drift in `{shortened(name)}` (medians): {facts}{accepted}.")
    more = f", {len(guilty) - rows:,} more with drift" if len(guilty) > rows else ""
    lines.append(
        f"Of {len(compared):,} batches compared with earlier ones, {len(compared) - len(guilty):,} without drift{more}."
    )
    return lines


def _reproduce(git: Mapping[str, str]) -> str:
    commit = git.get("git.commit")
    if not commit:
        return "Made outside a git repository: it cannot be derived again from a commit."
    if git.get("git.dirty"):
        return (
            f"Made from commit `{commit[:12]}` **with uncommitted changes**: the commit alone does not give this model."
        )
    return (
        f"Commit `{commit}`: `git checkout {commit} && dvc pull --run-cache; make repro`. "
        "`python -m pipelines.verify VERSION` does it in a place of its own and compares every byte of the weights."
    )


# -------------------------------------------------------------------------------------------------------- Markdown


def _markdown(template: str, values: Mapping[str, Any]) -> str:
    text = templates.render(Path(__file__).with_name(template), markdown_cell, **values).strip() + "\n"
    # MLflow shows table cells without any padding, and trims blanks: an em space behind each keeps columns apart.
    return "\n".join(line.replace(" |", "&emsp;|") if line.startswith("| ") else line for line in text.split("\n"))


def markdown_cell(value: object) -> object:
    """Text that cannot end its table cell nor begin HTML, whatever a class is called."""
    if not isinstance(value, str):
        return value
    return value.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
