"""reports/validation.json: what was judged, in counts."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from stages.data.validation.judging import ValidationResult
from stages.data.validation.splits import PRECEDENCE
from stages.params.batches import ROLES, Batch
from stages.params.validate import Validate

IN_REPORT = ("name", "scope", "severity", "column", "limit", "parameter", "reason", "fault")
"""What the report repeats of each expectation."""


def summary(
    result: ValidationResult, batches: dict[str, Batch], limits: Validate, accounts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The report as plain values: counts and figures, no time, no path, no host.

    Args:
        result: of judging all images.
        batches: in order of arrival.
        limits: of validation.
        accounts: what ingest understood of each batch; none where an older version ingested it.
    """
    images = result.images
    table: dict[str, Any] = {row["batch"]: row for row in result.batch_table.to_dict("records")}
    good = images["reason"] == ""
    splits = images[good].groupby(["batch", "split"]).size()
    # Where groups of earlier batches put their images: to `train`, or to what is held out.
    bound = images[good & (images["bound"] != "")].groupby(["batch", "split"]).size()
    reasons = images[~good].groupby(["batch", "reason"]).size()
    noted = pd.concat(
        [images["batch"].iloc[rows].to_frame().assign(name=name) for name, rows in result.noted.items()]
        or [pd.DataFrame({"batch": [], "name": []})]
    )
    notes = noted.groupby(["batch", "name"]).size()
    return {
        "accepted": int(good.sum()),
        "quarantined": int((~good).sum()),
        "quarantined_by": {name: int(count) for name, count in images.loc[~good, "reason"].value_counts().items()},
        "noted_by": {name: len(rows) for name, rows in result.noted.items() if len(rows)},
        "label_conflicts": _conflicts(images),
        "order": list(batches),
        "batches": {
            name: {
                "role": batch.role,
                "source": (accounts or {}).get(name),
                "images": int(table[name]["images"]),
                "accepted": int(table[name]["accepted"]),
                "quarantined": int(table[name]["quarantined"]),
                "share_quarantined": round(float(table[name]["share_quarantined"]), 6),
                "splits": _counts(splits, name),
                "bound": _counts(bound, name),
                "quarantined_by": _counts(reasons, name),
                "noted_by": _counts(notes, name),
                "accept_drift": batch.accept_drift,
                "drift": [fact._asdict() for fact in result.drift[name]],
            }
            for name, batch in batches.items()
        },
        "classes": {role: _class_counts(result, role) for role in ROLES},
        "expectations": [
            {
                "check": expectation.check[0],
                "failed": result.failed[expectation.name],
                **{name: getattr(expectation, name) for name in IN_REPORT},
            }
            for expectation in result.expectations
        ],
        "max_quarantined": limits.max_quarantined,
        "stops": result.stops,
        "notes": result.notes,
    }


def _conflicts(images: pd.DataFrame) -> list[dict[str, Any]]:
    """Images, quarantined or noted, by the two classes (sorted) that one picture has, most first."""
    found = images.loc[images["conflict_with"] != "", ["role", "class_name", "conflict_with"]]
    class_of = images.loc[images["key"].isin(set(found["conflict_with"])), ["key", "class_name"]]
    others: pd.Series = found["conflict_with"].map(dict(class_of.itertuples(index=False)))
    pairs = [(role, *sorted(two)) for role, *two in zip(found["role"], found["class_name"], others, strict=True)]
    counted = sorted(Counter(pairs).items(), key=lambda item: (-item[1], item[0]))
    return [{"role": role, "classes": two, "images": count} for (role, *two), count in counted]


def _counts(counts: pd.Series, batch: str) -> dict[str, int]:
    by_key: dict[Any, int] = counts.to_dict()
    return {key[1]: count for key, count in by_key.items() if key[0] == batch}


def _class_counts(result: ValidationResult, role: str) -> dict[str, dict[str, int]]:
    rows = result.class_table[result.class_table["role"] == role]
    splits = [split for split in PRECEDENCE if rows[split].any()]
    return {
        name: dict(zip(splits, map(int, counts), strict=True))
        for name, *counts in rows[["class_name", *splits]].itertuples(index=False)
    }


def as_json(report: dict[str, Any]) -> str:
    """The same report as the same text."""
    return json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
