"""Training curves: what pretraining and fine-tuning reported, epoch by epoch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.evaluation.charts import ticks
from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.runtime import layout

name = "curves"

Epochs = Sequence[Mapping[str, float]]


def measure(_: EvaluationInputs) -> Result:
    """The charts, and a table of all epochs of all runs; it has no figures."""
    runs = _runs()
    table = pd.DataFrame([{"run": run} | dict(epoch) for run, epochs in runs.items() for epoch in epochs])
    table = table.reindex(columns=["run", "epoch", *sorted(set(table.columns) - {"run", "epoch"})])
    return Result(ReportSection(Path(__file__).with_suffix(".html.j2"), {"panels": panels(runs)}), plots={name: table})


def _runs() -> dict[str, Epochs]:
    """Epochs of pretrain, finetuned and scratch; none where there was no such training."""
    finetune = _report(layout.FINETUNE_REPORTS)
    parts = {"pretrain": _report(layout.PRETRAIN_REPORTS)}
    parts |= {run: finetune.get(run, {}) for run in ("finetuned", "scratch")}
    return {run: part.get("epochs", []) for run, part in parts.items()}


def _report(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def panels(curves: Mapping[str, Epochs]) -> list[dict[str, Any]]:
    """Small charts of what training showed: target val top-1, target loss, pretraining loss and val top-1."""
    target = {name: curves[name] for name in ("finetuned", "scratch") if curves.get(name)}
    upstream = {"pretrain": curves["pretrain"]} if curves.get("pretrain") else {}
    charts = [
        _panel("Target: top-1 on val", target, ["val_top1", "val_robust_top1"], share=True),
        _panel("Target: loss", target, ["train_loss", "val_loss"], share=False),
        _panel("Backbone: top-1 on val", upstream, ["val_top1", "knn_top1", "val_robust_top1"], share=True),
        _panel("Backbone: loss", upstream, ["train_loss", "val_loss"], share=False),
    ]
    return [panel for panel in charts if panel["lines"]]


def _panel(title: str, runs: Mapping[str, Epochs], keys: list[str], share: bool) -> dict[str, Any]:
    """Lines as points in shares of the panel, (0, 0) at its lower left."""
    points = {
        (run, key): [(epoch["epoch"], epoch[key]) for epoch in epochs if key in epoch]
        for run, epochs in runs.items()
        for key in keys
    }
    every = [point for line in points.values() for point in line]
    top = 1.0 if share else 1.05 * max((y for _, y in every), default=1.0) or 1.0  # of one class the loss is 0
    last = max((x for x, _ in every), default=1)
    lines: list[dict[str, Any]] = [
        {"run": run, "key": key, "end": line[-1][1], "points": [((x - 1) / max(last - 1, 1), y / top) for x, y in line]}
        for (run, key), line in points.items()
        if line
    ]
    for number, line in enumerate(lines):
        # The end of a line is written beside it, unless another's is written there.
        before = [other["end"] for other in lines[:number] if other["named"]]
        line["named"] = line["key"] != "train_loss" and all(abs(line["end"] - end) > 0.07 * top for end in before)
    heights = [(y, y / top) for y in ticks(0, top, 4)]
    return {"title": title, "lines": lines, "share": share, "last": int(last), "ticks": heights}
