"""Data: accepted and quarantined images, by batch and by reason."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.evaluators.label_errors import suspects
from stages.runtime import layout

name = "data"


def measure(inputs: EvaluationInputs) -> Result:
    """`data`: images accepted and quarantined over all batches and roles, and training images that look mislabelled."""
    quarantine = pd.read_parquet(layout.QUARANTINE, columns=["batch", "reason"])
    figures = {
        "accepted": sum(pq.read_metadata(path).num_rows for path in layout.ACCEPTED.rglob("*.parquet")),
        "quarantined": len(quarantine),
        "label_suspects": len(suspects(inputs.training, inputs.train.label, len(inputs.classes))),
    }
    values = {
        "batches": _batches(_counts(quarantine["batch"])),
        "reasons": _counts(quarantine["reason"]),
        "splits": ("train", "val", "test", "fresh"),
    }
    return Result(ReportSection(Path(__file__).with_suffix(".html.j2"), values), {name: figures})


def _batches(quarantined: Mapping[str, int]) -> list[dict[str, Any]]:
    """A row per batch: accepted images by split, and how many were quarantined; pretrain first."""
    paths = sorted(layout.ACCEPTED.glob("*/*.parquet"), key=lambda path: (path.parent.name == "finetune", path.name))
    return [
        {
            "batch": path.stem,
            "role": path.parent.name,
            "accepted": _counts(pd.read_parquet(path, columns=["split"])["split"]),
            "quarantined": quarantined.get(path.stem, 0),
        }
        for path in paths
    ]


def _counts(values: pd.Series) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    counts = {str(value): int(n) for value, n in values.value_counts().items()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
