"""Messages about batches, classes and drift: what failed, where, and which parameter governs it."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from stages.data.validation.expectations import Expectation

SHOWN = 5
"""Files and classes that a message names."""


def explain(
    expectation: Expectation, wrong: pd.DataFrame, images: pd.DataFrame, of_images: Sequence[Expectation] = ()
) -> list[str]:
    """One message per batch, or per role, about the rows of a table that fail `expectation`.

    Args:
        expectation: one with a `message`.
        wrong: failing rows of the table of its step (tables.py).
        images: all of them, with reason (empty: accepted).
        of_images: the expectations that may be such a reason.
    """
    message = expectation.message
    assert message is not None, f"no message for {expectation.name}"
    wrong = wrong.query(message.only) if message.only else wrong
    template = message.text + (message.remedy if expectation.severity == "stop" else "")
    messages = []
    for _, rows in wrong.groupby(message.per, sort=False):
        records: list[dict[Any, Any]] = rows.to_dict("records")
        values = {
            "limit": expectation.limit,
            "parameter": expectation.parameter,
            "rows": len(records),
            "classes_have": "1 class has" if len(records) == 1 else f"{len(records):,} classes have",
            "items": _first(message.item.format_map(record) for record in records),
        }
        if message.per == "batch":
            batch, role = records[0]["batch"], records[0]["role"]
            values |= {"where": f"batch `{batch}` ({role})", "worst": _worst(images, batch)}
            values["most"] = _most(images, batch, of_images)
        messages.append(template.format_map(records[0] | values))
    return messages


def printable(text: str) -> str:
    """File and class names come from strangers: control characters are escaped before they reach a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _first(items: Iterable[str]) -> str:
    names = list(items)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more


def _most(images: pd.DataFrame, batch: str, of_images: Sequence[Expectation]) -> str:
    """The expectation that took most of a batch, and what loosens it."""
    taken = images.loc[(images["batch"] == batch) & (images["reason"] != ""), "reason"].value_counts().to_dict()
    most = max(of_images, key=lambda each: taken.get(each.name, 0), default=None)
    if most is None or not taken.get(most.name):
        return ""
    return f". If those are sound: {most.name} takes most, and {most.loosened_by} loosens it"


def _worst(images: pd.DataFrame, batch: str) -> str:
    """What was wrong with a batch: counts by reason, and the first files."""
    bad = images[(images["batch"] == batch) & (images["reason"] != "")].sort_values("key")
    if bad.empty:
        return ""
    counts = ", ".join(f"{reason} {count:,}" for reason, count in bad["reason"].value_counts().items())
    first = []
    for row in bad.head(SHOWN).to_dict("records"):
        why = f" of {row['duplicate_of']}" if row["duplicate_of"] else f": {row['error']}" if row["error"] else ""
        first.append(printable(f"{row['key']} ({row['reason']}{why})"))
    return f": {counts}. First: {'; '.join(first)}"
