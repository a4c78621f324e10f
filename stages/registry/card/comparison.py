"""Two versions side by side, as the card and review.html show them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.evaluation.gate import Comparison, Verdict
from stages.evaluation.statistics.intervals import paired_interval, wilson
from stages.pages.text import ABSENT, percent
from stages.registry.gate_review import Review

FIGURES = {
    "top1": ("top-1, %", 100, 1),
    "worst_class_recall": ("recall of the worst class, %", 100, 1),
    "macro_f1": ("macro-F1, %", 100, 1),
    "ece": ("ECE", 1, 3),
    "nll": ("NLL", 1, 3),
    "latency_ms": ("one image when registered, ms", 1, 1),
    "size_mb": ("weights, MB", 1, 1),
}
"""What of two versions stands side by side: label, scale and digits."""


def comparison_rows(verdict: Verdict) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The comparisons as people read them: overall, by class, and by batch of fresh images."""
    compared = [each for each in verdict.comparisons if each.images]
    counts = np.array([(c.images, c.before, c.now, c.won, c.lost) for c in compared], dtype=np.int64).reshape(-1, 5)
    images, before, now, won, lost = counts.T
    confidence = 1 - verdict.alpha
    intervals = wilson(before, images, confidence), wilson(now, images, confidence)
    ends = np.stack([*intervals[0], *intervals[1], *paired_interval(won, lost, images, confidence)], axis=1)
    rows = [(each.kind, _row(each, *low_high)) for each, low_high in zip(compared, ends.tolist(), strict=True)]

    def of(wanted: str) -> list[dict[str, Any]]:
        return [row for kind, row in rows if kind == wanted]

    return of("test") + of("fresh"), of("class"), of("batch")


def _row(each: Comparison, *ends: float) -> dict[str, Any]:
    """Text and numbers. `ends` are low and high of accuracy before, of accuracy now, and of the difference."""
    before, now = each.before / each.images, each.now / each.images
    return {
        "name": each.name,
        "images": f"{each.images:,}",
        "before": with_interval(before, *ends[:2]),
        "now": with_interval(now, *ends[2:4]),
        "before_only": percent(before),
        "now_only": percent(now),
        "points": 100 * each.difference,
        "difference": f"{100 * each.difference:+.1f}",
        "range": f"{100 * ends[4]:+.1f} … {100 * ends[5]:+.1f}",
        "won": each.won,
        "lost": each.lost,
        "both": each.now - each.won,
        "neither": each.images - each.now - each.lost,
        "worse": each.worse,
    }


def figure_rows(review: Review) -> list[dict[str, str]]:
    """The figures of both versions side by side; none where no version is in force.

    Top-1 is among them only where the two could not be compared: else it stands above, on the same images.
    """
    if not review.against:
        return []
    return [
        {"name": label, "before": _figure(review.figures_in_force, key), "now": _figure(review.figures, key)}
        for key, (label, _, _) in FIGURES.items()
        if key != "top1" or not review.verdict.comparisons
    ]


def _figure(figures: Mapping[str, float | None], key: str) -> str:
    _, scale, digits = FIGURES[key]
    value, low, high = (figures.get(name) for name in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return ABSENT
    ends = "" if low is None or high is None else f" ({scale * low:.{digits}f} – {scale * high:.{digits}f})"
    return f"{scale * value:.{digits}f}{ends}"


def with_interval(share: float, low: float, high: float) -> str:
    """`85.3 % (83.4 – 88.8)`."""
    return f"{percent(share)} ({100 * low:.1f} – {100 * high:.1f})"
