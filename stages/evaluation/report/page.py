"""reports/report.html: one file that a reviewer reads from top to bottom, without network; its script adds no content.

Everything a figure needs is worked out here; the template places it. Whatever is drawn is SVG, in shares of the space
it gets, so that it fits a laptop, a narrow window and paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.evaluation.evaluators.galleries import Galleries
from stages.evaluation.evaluators.slices import Slice, below, error_rate
from stages.evaluation.metrics import Int64, PerClass, Reliability, Selective, per_class
from stages.evaluation.report.confusion_map import confusion_map
from stages.evaluation.statistics.intervals import class_intervals
from stages.pages import templates
from stages.pages.images import thumbnail
from stages.pages.text import words

if TYPE_CHECKING:
    from stages.evaluation.evaluators.robustness import Example
    from stages.evaluation.evaluators.robustness import Findings as Robustness

MOST_PAIRS = 12
MOST_SLICES, FEW_SLICES = 20, 5
MOST_CLASSES_AT_ONCE = 40
"""Longer tables of classes show the worst and fold the rest away."""
MOST_CLASSES_IN_HEAT_MAP = 24
MODELS = {
    "before": ("Before", "frozen backbone, nearest class mean"),
    "test": ("After", "fine-tuned"),
    "scratch": ("From scratch", "same recipe, random start"),
}


@dataclass(frozen=True)
class DataRow:
    """A batch: accepted images by split, and how many were quarantined."""

    batch: str
    role: str
    accepted: Mapping[str, int]
    quarantined: int


@dataclass(frozen=True)
class Findings:
    """All that the report shows."""

    classes: Sequence[str]
    metrics: Mapping[str, Any]
    """As in reports/metrics.json."""
    confusion: Int64
    reliability: Reliability
    selective: Selective
    calibrated_ece: float
    """ECE that a perfectly calibrated model would show on as many images."""
    slices: Sequence[Slice]
    """All that were looked at, the ones that are below first."""
    galleries: Galleries
    robustness: "Robustness | None"
    """None where it is not wanted."""
    curves: Mapping[str, Sequence[Mapping[str, float]]]
    """Epochs by run: pretrain, finetuned, scratch."""
    data: Sequence[DataRow]
    reasons: Mapping[str, int]
    """Quarantined images by reason."""
    config: Mapping[str, Any]
    """Of the fine-tuned model."""
    sha256: str
    """Of its weights."""
    settings: Mapping[str, Any]
    """The section `evaluate`."""


def render(findings: Findings) -> str:
    """The page. The same findings give the same bytes."""
    rows = class_rows(findings.classes, findings.confusion, findings.settings["confidence"])
    worst = rows[0] if rows else None
    weak = below(findings.slices, findings.settings["confidence"])
    return templates.render(
        Path(__file__).with_name("page.html.j2"),
        findings=findings,
        test=findings.metrics["test"],
        models=model_rows(findings.metrics),
        axis=ticks(0, 1, 5),
        worst=worst,
        classes=rows[:MOST_CLASSES_AT_ONCE],
        more_classes=rows[MOST_CLASSES_AT_ONCE:],
        pairs=confused_pairs(findings.classes, findings.confusion),
        heat_map=heat_map(findings.classes, findings.confusion),
        map=confusion_map(findings.classes, findings.confusion),
        bins=reliability_bars(findings.reliability),
        silent=silence(findings.selective),
        panels=curve_panels(findings.curves),
        weak=weak,
        slice_level=error_rate(findings.settings["confidence"]),
        shown_slices=weak[:MOST_SLICES] or findings.slices[:FEW_SLICES],
        galleries=findings.galleries,
        robust=findings.robustness.figures if findings.robustness else None,
        spoilt=[spoilt(each) for each in findings.robustness.examples] if findings.robustness else [],
        fresh=findings.metrics["fresh"],
        splits=("train", "val", "test", "fresh"),
    )


def model_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Before, after and from scratch: figures, and what fine-tuning gained over each. What is not there is left out."""
    return [
        {"id": name, "label": label, "figures": metrics[name], "gain": metrics["gain"].get(name)}
        for name, label in MODELS.items()
        if metrics[name]["top1"] is not None
    ]


def class_rows(classes: Sequence[str], confusion: Int64, confidence: float) -> list[dict[str, Any]]:
    """A row per class, the lowest recall first; classes without images last."""
    figures: PerClass = per_class(confusion)
    ends = class_intervals(confusion, confidence)
    rows = []
    for index, name in enumerate(classes):
        wrong = np.where(np.arange(len(classes)) == index, 0, confusion[index])
        rows.append(
            {
                "name": name, "support": int(figures.support[index]), "recall": figures.recall[index],
                "low": ends.recall_low[index], "high": ends.recall_high[index],
                "precision": figures.precision[index], "precision_low": ends.precision_low[index],
                "precision_high": ends.precision_high[index], "f1": figures.f1[index], "f1_low": ends.f1_low[index],
                "f1_high": ends.f1_high[index], "taken_for": classes[int(wrong.argmax())] if wrong.any() else "",
                "times": int(wrong.max(initial=0)),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (np.isnan(row["recall"]), row["recall"]))  # the first of equals, as in figures


def confused_pairs(classes: Sequence[str], confusion: Int64) -> list[dict[str, Any]]:
    """The most frequent mistakes, as counts and as shares of the true class."""
    wrong = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        {
            "actual": classes[i],
            "predicted": classes[j],
            "times": int(wrong[i, j]),
            "share": wrong[i, j] / confusion[i].sum(),
        }
        for i, j in pairs
        if wrong[i, j]
    ]


def heat_map(classes: Sequence[str], confusion: Int64) -> dict[str, Any]:
    """Counts and shares of the row, of all classes or, of too many, of those with the most mistakes."""
    mistakes = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES_IN_HEAT_MAP])
    support = np.maximum(confusion.sum(axis=1), 1)
    rows = [
        {
            "name": classes[i],
            "cells": [
                {"times": int(confusion[i, j]), "share": confusion[i, j] / support[i], "hit": i == j} for j in shown
            ],
        }
        for i in shown
    ]
    return {"names": [classes[j] for j in shown], "rows": rows, "whole": len(shown) == len(classes)}


def reliability_bars(curve: Reliability) -> list[dict[str, float]]:
    """The bins that hold images: edges, confidence, accuracy, images, and the share of the fullest bin."""
    fullest = max(curve.count.max(initial=0), 1)
    return [
        {
            "low": curve.low[i], "high": curve.high[i], "confidence": curve.confidence[i],
            "accuracy": curve.accuracy[i], "count": int(curve.count[i]), "height": curve.count[i] / fullest,
        }
        for i in np.flatnonzero(curve.count)
    ]  # fmt: skip


def silence(curve: Selective) -> dict[str, Any]:
    """The curve in shares of its chart."""
    rows = selective_rows(curve)
    least = min((row["accuracy"] for row in rows), default=0.0)
    bottom = np.floor(10 * least) / 10 if least < 1 else 0.9
    heights = [{"value": value, "height": (value - bottom) / (1 - bottom)} for value in ticks(bottom, 1, 5)]
    points = [(row["coverage"], (row["accuracy"] - bottom) / (1 - bottom)) for row in rows]
    return {"ticks": heights, "points": points}


def selective_rows(curve: Selective) -> list[dict[str, float]]:
    """Accuracy and least confidence at each percent of coverage, of as many as there are images for."""
    n = len(curve.coverage)
    places = np.unique(np.ceil(np.linspace(0, n, 101)[1:]).astype(np.int64) - 1)[:n]
    return [
        {
            "coverage": float(curve.coverage[i]),
            "accuracy": float(curve.accuracy[i]),
            "confidence": float(curve.confidence[i]),
        }
        for i in places
    ]


def robustness_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every kind of change as a row of reports/plots/robustness.csv, shares 0-1 with their intervals.

    Of corruptions the mean over severities, and each severity in a column.

    Args:
        figures: as `stages.evaluation.evaluators.robustness.measure` describes them.
    """
    rows = [_change("clean", "as they are", figures["clean"], "top1")]
    for name, each in figures["corruptions"].items():
        mean = {"top1": 1 - each["error"], "low": 1 - each["error_high"], "high": 1 - each["error_low"]}
        severities = {f"severity_{severity}": top1["top1"] for severity, top1 in each["top1"].items()}
        rows.append({"kind": "corruption", "change": words(name)} | mean | severities)
    for method, by_epsilon in figures["attacks"].items():
        rows += [
            _change("attack", f"{method}, epsilon {epsilon}", top1, "top1") for epsilon, top1 in by_epsilon.items()
        ]
    rows += [
        _change("consistency", f"same after {kind}", each, "same") for kind, each in figures["consistency"].items()
    ]
    return rows


def _change(kind: str, change: str, figures: Mapping[str, float], name: str) -> dict[str, Any]:
    ends = {"top1": figures[name], "low": figures[f"{name}_low"], "high": figures[f"{name}_high"]}
    return {"kind": kind, "change": change} | ends


def spoilt(example: "Example") -> dict[str, Any]:
    """An image as it was, and in every way that it was spoilt, encoded."""
    pictures = {"as it is": example.clean} | example.corrupted
    return {
        "severity": example.severity,
        "pictures": {words(name): thumbnail(each) for name, each in pictures.items()},
    }


def curve_panels(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Small charts of what training showed: target val top-1, target loss, pretraining loss and val top-1."""
    target = {name: curves[name] for name in ("finetuned", "scratch") if curves.get(name)}
    upstream = {"pretrain": curves["pretrain"]} if curves.get("pretrain") else {}
    panels = [
        _panel("Target: top-1 on val", target, ["val_top1", "val_robust_top1"], share=True),
        _panel("Target: loss", target, ["train_loss", "val_loss"], share=False),
        _panel("Backbone: top-1 on val", upstream, ["val_top1", "knn_top1", "val_robust_top1"], share=True),
        _panel("Backbone: loss", upstream, ["train_loss", "val_loss"], share=False),
    ]
    return [panel for panel in panels if panel["lines"]]


def _panel(
    title: str, runs: Mapping[str, Sequence[Mapping[str, float]]], keys: list[str], share: bool
) -> dict[str, Any]:
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


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted, steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    return [round(float(value), 10) for value in np.arange(np.ceil(low / step) * step, high + step / 1e6, step)]
