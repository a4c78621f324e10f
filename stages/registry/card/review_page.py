"""review.html: one self-contained page that compares a candidate with the version in force."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.pages import templates
from stages.registry.card.comparison import comparison_rows, figure_rows
from stages.registry.gate_review import Review, class_name
from stages.registry.records import GATE, REVIEW
from stages.runtime.files import write_json, write_text

MOST_CHANGED = 40
"""Images of each kind that the page names."""
EXPORTS_BEGIN, EXPORTS_END = "<!-- exports -->", "<!-- end of exports -->"
"""Around a section of the page. No other text can look like them: all of it is escaped."""


def render_review(review: Review) -> str:
    """The page. Rows are the images that both versions answered."""
    overall, classes, batches = comparison_rows(review.verdict)
    return templates.render(
        Path(__file__).with_name("review.html.j2"),
        review=review,
        verdict=review.verdict,
        overall=overall,
        classes=sorted(classes, key=lambda row: row["points"]),
        batches=batches,
        figures=figure_rows(review),
        widest=max((abs(row["points"]) for row in classes), default=0) or 1,
        changed=changed_images(review),
        most=MOST_CHANGED,
    )


def with_exports(page: str, exports: Mapping[str, Any]) -> str:
    """The same page with its section `Exports` made anew, or added at its end; all else as it was.

    Args:
        exports: the figures of each format, as stages.export records them.
    """
    template = Path(__file__).with_name("exports.html.j2")
    section = templates.render(template, exports=exports, begin=EXPORTS_BEGIN, end=EXPORTS_END)
    before, begin, rest = page.partition(EXPORTS_BEGIN)
    if begin:
        return before + section + rest.partition(EXPORTS_END)[2]
    before, _, after = page.rpartition("</body>")
    return f"{before}{section}\n</body>{after}"


def write_verdict(review: Review, folder: Path, exports: Mapping[str, Any] | None = None) -> None:
    """gate.json and review.html, with what is recorded of exports."""
    write_json(folder / GATE, review.verdict.to_dict())
    page = render_review(review)
    write_text(folder / REVIEW, with_exports(page, exports) if exports else page)


def changed_images(review: Review) -> dict[str, list[dict[str, str]]]:
    """Images that only the candidate has right (`won`), and that only the version in force has (`lost`), by key.

    Under the same label, as the gate counts them.
    """
    changed: dict[str, list[dict[str, str]]] = {"won": [], "lost": []}
    if review.in_force is None or not review.verdict.comparisons:
        return changed
    same = zip(review.in_force.keys, review.in_force.labels.tolist(), strict=True)
    before = dict(zip(same, review.in_force.predicted.tolist(), strict=True))
    candidate = review.candidate
    for key, label, now in zip(candidate.keys, candidate.labels.tolist(), candidate.predicted.tolist(), strict=True):
        was = before.get((key, label))
        if was is not None and (now == label) != (was == label):
            names = {"is": label, "before": was, "now": now}
            row = {column: class_name(review.classes, each) for column, each in names.items()}
            changed["won" if now == label else "lost"].append({"key": key} | row)
    return changed
