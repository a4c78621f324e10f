"""The model card: a version's description in MLflow.

MLflow's version page shows neither metrics nor plots, so the card carries the figures. It is Markdown with tables, and
at most 5,000 characters long: more does not fit into MLflow's own column on PostgreSQL. So its tables shrink until all
fits. The verdict with the comparison comes first, and whatever is too long, it is never cut.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.evaluation.predictions import VersionPredictions
from stages.evaluation.statistics.intervals import wilson
from stages.pages.templates import render_markdown
from stages.pages.text import ABSENT, percent, shortened
from stages.registry.card.comparison import comparison_rows, figure_rows, with_interval
from stages.registry.gate_review import BatchCounts, Candidate, Review, class_name
from stages.registry.tags import COMMIT, DIRTY

MOST_CHARACTERS = 5000
ROOM_FOR_COMMIT = 100
"""Kept free: a commit that is named later is longer than what stands in for it until then."""
ROWS = (6, 4, 3, 2, 1)
"""Of every table whose length depends on the data: the most that fits is taken."""
SECOND_PART = "### This model\n"
"""Begins what stays of a card when the gate is taken again."""
CUT = "\n\nThere is more than fits here: see the run.\n"
MODELS = {
    "before": "before fine-tuning (frozen backbone, nearest class mean)",
    "test": "**fine-tuned: this model**",
    "scratch": "from scratch (same recipe)",
}
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
    return class_name(classes, int(np.bincount(predicted).argmax())) if len(predicted) else ABSENT


# ------------------------------------------------------------------------------------------------ the model itself


def _model_part(candidate: Candidate, review: Review, links: Mapping[str, str], rows: int) -> str:
    reasons = sorted(candidate.quarantined.items(), key=lambda item: (-item[1], item[0]))
    metrics = candidate.metrics
    parts = [(label, metrics.get(part) or {}) for part, label in MODELS.items()]
    values = {
        "heading": SECOND_PART.strip(),
        "config": candidate.config,
        "latency_ms": candidate.latency_ms,
        "confidence": candidate.confidence,
        "test_images": review.candidate.test.sum(),
        "accuracy": [(label, figures) for label, figures in parts if figures.get("top1") is not None],
        "figures": _figures(metrics.get("test", {})),
        "commit": candidate.git.get(COMMIT),
        "dirty": candidate.git.get(DIRTY),
        "links": links,
        "batches": _batch_rows(candidate.batches, rows),
        "data": metrics.get("data", {}),
        "quarantined": reasons[:rows],
        "more_reasons": len(reasons[rows:]),
        "sources": _source_lines(candidate.validation, rows),
        "drift": _drift_lines(candidate.validation.get("batches", {}), rows),
    }
    return _markdown("model_card.md.j2", values)


def _figures(test: Mapping[str, Any]) -> list[str]:
    shares = {"top5": "top-5", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}
    parts = [f"{label} {percent(test[key])}" for key, label in shares.items() if test.get(key) is not None]
    return parts + [f"{key.upper()} {test[key]:.3f}" for key in ("ece", "nll") if test.get(key) is not None]


def _batch_rows(batches: Sequence[BatchCounts], rows: int) -> list[tuple[str, str, Mapping[str, int]]]:
    """Name, role and counts of the newest, one by one, and the sum of all before them."""
    newest, earlier = batches[-rows:], batches[:-rows]
    shown: list[tuple[str, str, Mapping[str, int]]] = [(each.name, each.role, each.counts) for each in newest]
    total = sum((Counter(each.counts) for each in earlier), Counter())
    return [(f"{len(earlier):,} earlier", "", total), *shown] if earlier else shown


def _source_lines(validation: Mapping[str, Any], rows: int) -> list[str]:
    """What ingest understood of the newest batches, a line each: the layout, what was left out, and what looks odd."""
    lines = []
    for name in validation.get("order", [])[-rows:]:  # a report of an older version has none
        if source := validation["batches"][name].get("source"):
            left_out = sum(each["files"] for each in source["left_out"].values())
            odd = f"; **odd:** {shortened('; '.join(source['odd']), 50 * rows)}" if source["odd"] else ""
            of = f"{source['layout']}, {source['classes']['count']:,} classes, {left_out:,} files left out"
            lines.append(f"- `{shortened(name)}`: {of}{odd}")
        else:
            lines.append(f"- `{shortened(name)}`: what ingest understood is not recorded")
    return lines


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


# -------------------------------------------------------------------------------------------------------- Markdown


def _markdown(template: str, values: Mapping[str, Any]) -> str:
    text = render_markdown(Path(__file__).with_name(template), **values).strip() + "\n"
    # MLflow shows table cells without any padding, and trims blanks: an em space behind each keeps columns apart.
    return "\n".join(line.replace(" |", "&emsp;|") if line.startswith("| ") else line for line in text.split("\n"))
