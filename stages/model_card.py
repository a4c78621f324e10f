"""What a reviewer reads: the model card (the version's description in MLflow) and the page that compares two versions.

MLflow's version page shows neither metrics nor plots, so the card carries the figures. It is Markdown with tables, and
at most 5,000 characters long: more does not fit into MLflow's own column on PostgreSQL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.evaluation.gate import Verdict

MOST_CHARACTERS = 5000
MOST_BATCHES = 8
MOST_REASONS = 12
WORST_CLASSES = 5
SPLITS = ("train", "val", "test", "fresh")


@dataclass(frozen=True)
class Batch:
    """What training and evaluation had of a batch: images per split."""

    name: str
    role: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Candidate:
    """All that is known of the model that is to be registered."""

    sha256: str
    config: Mapping[str, Any]
    """models/finetuned/config.json"""
    metrics: Mapping[str, Any]
    """reports/metrics.json"""
    predictions: pd.DataFrame
    """reports/predictions.parquet: key, batch, split, label, logits"""
    quarantined: Mapping[str, int]
    """Images by reason."""
    batches: Sequence[Batch]
    confidence: float
    """Of the intervals, 0-1."""
    git: Mapping[str, str]
    latency_ms: tuple[float, float]
    """Median and 95th percentile of one image on a CPU."""


@dataclass(frozen=True)
class Review:
    """The gate's verdict, and the version that it was taken against."""

    verdict: Verdict
    against: str
    """As a person calls it, `version 3`; empty where nothing was in force."""
    in_force: pd.DataFrame | None
    """reports/predictions.parquet of that version, where it still has one."""

    @property
    def line(self) -> str:
        """The verdict in one sentence."""
        against = f"against {self.against}" if self.against else "floors only: no version was in force"
        return f"Gate: {self.verdict.result} ({against})"

    @property
    def note(self) -> str:
        """What the verdict means."""
        if not self.against:
            return "The first model has only floors to clear. The next is held against the version then in force."
        return (
            f"Compared with {self.against}, `{(self.verdict.in_force or '')[:12]}`, on the same test images. An "
            f"equally good model passes in at most {percent(self.verdict.alpha, 0)} of cases, an identical one never."
        )


def render_card(candidate: Candidate, review: Review, links: Mapping[str, str]) -> str:
    """The card in Markdown. `links` are label to address, relative ones within MLflow's UI."""
    test = candidate.metrics.get("test", {})
    values = {
        "verdict_line": review.line,
        "confidence": percent(candidate.confidence, digits=0),
        "test_images": test.get("count") or int((candidate.predictions["split"] == "test").sum()),
        "accuracy": _accuracy_rows(candidate.metrics),
        "figures": _figures(test),
        "conditions": review.verdict.conditions,
        "compared": review.note,
        "worst_classes": worst_classes(candidate.predictions, candidate.config["classes"]),
        "batches": _batch_rows(candidate.batches),
        "quarantine_line": _quarantine_line(candidate.metrics.get("data", {})),
        "quarantined": [
            {"reason": reason, "images": n} for reason, n in [*candidate.quarantined.items()][:MOST_REASONS]
        ],
        "architecture": candidate.config["architecture"],
        "image_size": candidate.config["image_size"],
        "classes": len(candidate.config["classes"]),
        "latency": "median {:.1f} ms, 95 % within {:.1f} ms".format(*candidate.latency_ms),
        "reproduce": _reproduce(candidate.git),
        "links": list(links.items()),
    }
    card = _spaced(_templates(markdown_cell).get_template("model_card.md.j2").render(values).strip() + "\n")
    rest = "\n\nThere is more than fits here: see the run.\n"
    return card if len(card) <= MOST_CHARACTERS else card[: MOST_CHARACTERS - len(rest)].rsplit("\n", 1)[0] + rest


def render_review(candidate: Candidate, review: Review) -> str:
    """One self-contained HTML page: the candidate beside the version in force, on the test images both answered."""
    paired = None
    if review.in_force is not None:
        paired = compare(candidate.predictions, review.in_force, candidate.config["classes"])
    values = {"review": review, "sha256": candidate.sha256, "paired": paired}
    return _templates(None).get_template("review.html.j2").render(values)


def worst_classes(predictions: pd.DataFrame, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The classes of lowest recall on `test`, the worst first: name, recall, images, and what they were taken for."""
    answers = _answers(predictions)
    rows = []
    for label in answers["label"].unique():
        of_class = answers[answers["label"] == label]
        wrong = of_class.loc[~of_class["correct"], "predicted"]
        recall = float(of_class["correct"].mean())
        taken_for = classes[int(wrong.mode().iloc[0])] if len(wrong) else "–"
        rows.append((recall, int(label), len(of_class), taken_for))
    return [
        {"name": classes[label], "recall": percent(recall), "images": images, "taken_for": taken_for}
        for recall, label, images, taken_for in sorted(rows)[:WORST_CLASSES]
    ]


def compare(candidate: pd.DataFrame, in_force: pd.DataFrame, classes: Sequence[str]) -> dict[str, Any]:
    """Counts of who was right on the test images that both answered, and recall per class where it differs."""
    before = _answers(in_force)["correct"].rename("before")
    both = _answers(candidate).join(before, how="inner")
    new, old = both["correct"].to_numpy(), both["before"].to_numpy()
    labels = both["label"].to_numpy()
    per_class = [(name, new[labels == i], old[labels == i]) for i, name in enumerate(classes) if (labels == i).any()]
    changes = [
        {
            "name": name,
            "images": len(now),
            "before": percent(then.mean()),
            "now": percent(now.mean()),
            "change": f"{100 * (now.mean() - then.mean()):+.1f}",
        }
        for name, now, then in per_class
    ]
    return {
        "images": len(both),
        "top1_before": percent(old.mean()) if len(both) else "–",
        "top1_now": percent(new.mean()) if len(both) else "–",
        "both": int((new & old).sum()),
        "only_now": int((new & ~old).sum()),
        "only_before": int((~new & old).sum()),
        "neither": int((~new & ~old).sum()),
        "classes": sorted(changes, key=lambda row: float(row["change"])),
    }


def _answers(predictions: pd.DataFrame) -> pd.DataFrame:
    """A row per test image, by key: label, predicted, correct."""
    test = predictions[(predictions["split"] == "test") & (predictions["label"] >= 0)]
    predicted = np.array([int(np.argmax(logits)) for logits in test["logits"]], dtype=np.int64)
    columns = {
        "label": test["label"].to_numpy(),
        "predicted": predicted,
        "correct": predicted == test["label"].to_numpy(),
    }
    return pd.DataFrame(columns, index=pd.Index(test["key"]))


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
    return "" if low is None or high is None else f"{100 * low:.1f} – {percent(high)}"


def _figures(test: Mapping[str, Any]) -> str:
    shares = {"top5": "top-5", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}
    parts = [f"{label} {percent(test[key])}" for key, label in shares.items() if test.get(key) is not None]
    parts += [f"{key.upper()} {test[key]:.3f}" for key in ("ece", "nll") if test.get(key) is not None]
    return ", ".join(parts)


def _batch_rows(batches: Sequence[Batch]) -> list[dict[str, str]]:
    rows = [{"batch": each.name, "role": each.role, **_counts(each.counts)} for each in batches[-MOST_BATCHES:]]
    if earlier := batches[:-MOST_BATCHES]:
        total = {split: sum(each.counts.get(split, 0) for each in earlier) for split in SPLITS}
        rows.insert(0, {"batch": f"{len(earlier)} more", "role": "", **_counts(total)})
    return rows


def _counts(counts: Mapping[str, int]) -> dict[str, str]:
    return {split: f"{counts[split]:,}" if counts.get(split) else "–" for split in SPLITS}


def _quarantine_line(data: Mapping[str, Any]) -> str:
    if data.get("accepted") is None:
        return ""
    return f"{data['accepted']:,} images accepted, {data['quarantined']:,} quarantined."


def _reproduce(git: Mapping[str, str]) -> str:
    commit = git.get("git.commit")
    if not commit:
        return "Made outside a git repository: it cannot be derived again from a commit."
    again = f"`git checkout {commit} && dvc pull --run-cache; make repro`"
    if git.get("git.dirty"):
        return (
            f"Made from commit `{commit[:12]}` **with uncommitted changes**: the commit alone does not give this model."
        )
    return f"Commit `{commit}`: {again}"


def percent(share: float, digits: int = 1) -> str:
    """`0.853` as `85.3 %`."""
    return f"{100 * share:.{digits}f} %"


def _spaced(card: str) -> str:
    """MLflow shows table cells without any padding, and trims blanks: an em space behind each keeps columns apart."""
    rows = [line.replace(" |", "&emsp;|") if line.startswith("| ") else line for line in card.split("\n")]
    return "\n".join(rows)


def markdown_cell(value: object) -> object:
    """Text that cannot end its table cell, whatever a class is called."""
    return value.replace("|", "\\|").replace("\n", " ") if isinstance(value, str) else value


def _templates(finalize: Any) -> Environment:
    # HTML is escaped by Jinja (autoescape); Markdown's tables by `finalize`.
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
