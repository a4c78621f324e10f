"""How often do the intervals hold the truth? Draws test sets from populations whose figures are known exactly.

    python -m bench.coverage --draws 1000 --images 500 2000 --classes 10 100 --check

A population is a large table of images: true class and logits of two models, of which some classes are harder than
others. A test set is drawn from it with replacement, so the figures of the table are the truth, without error. Each
set gets `figures` and `gain` as the stage evaluate calls them. With --check it ends with 1 where an interval that shall
hold the truth in 93 to 97 % of the sets contradicts that. Set OMP_NUM_THREADS=1 to run several side by side.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.evaluation import metrics
from stages.evaluation.metrics import Float64, Floats, Int64
from stages.evaluation.statistics import intervals
from stages.evaluation.statistics.intervals import wilson
from stages.params.evaluate import Evaluate

NOMINAL = 0.93, 0.97
CLAIMED = ("top1", "nll", "brier", "gain top1", "gain nll", "gain brier")
"""Must lie within NOMINAL; the rest is measured and stated."""
FEWEST_ERRORS = 25
"""Expected in a test set for which anything is claimed: of fewer, one more or less decides the mean loss."""
IMAGES = 200_000
"""In a population of up to 100 classes; fewer of more."""


@dataclass(frozen=True)
class Model:
    """How good and how sure the models of a population are."""

    name: str
    margin: float
    """Of the true class's logit over what the highest of the others is about, in standard deviations."""
    sharpness: float
    """Factor on the logits that would be calibrated."""


MODELS = (
    Model("weak", -0.3, 1.0),
    Model("good", 0.4, 1.7),
    Model("excellent", 1.2, 1.7),
    Model("few errors", 2.2, 1.7),
)


@dataclass(frozen=True)
class Population:
    """Labels (M,) and logits (M, C) float32 of two models that share most of their errors."""

    labels: Int64
    one: Floats
    other: Floats
    truth: Mapping[str, float]
    per_class: metrics.PerClass


def population(model: Model, classes: int, seed: int = 1) -> Population:
    """Classes are alike in number and differ in margin; the other model sees the same images a little worse."""
    rng, images = np.random.default_rng(seed), min(IMAGES, 20_000_000 // classes)
    labels = rng.integers(0, classes, images)
    margin = np.sqrt(2 * np.log(classes)) + model.margin
    shift = (margin + rng.normal(0, 0.5, classes))[labels].astype(np.float32)
    one = rng.standard_normal((images, classes), np.float32)
    other = np.sqrt(0.8, dtype=np.float32) * one + np.sqrt(0.2, dtype=np.float32) * rng.standard_normal(
        (images, classes), np.float32
    )
    for logits, less in ((one, 0.0), (other, 0.15)):
        logits[np.arange(images), labels] += shift - np.float32(less)
        # Of normal logits with this margin, these are the log-odds.
        logits *= np.float32(model.sharpness * margin)
    confusion = metrics.confusion_matrix(labels, metrics.predicted_classes(one), classes)
    return Population(labels, one, other, _truth(labels, one, other), metrics.per_class(confusion))


def _truth(labels: Int64, one: Floats, other: Floats) -> dict[str, float]:
    own, others = (_figures(logits, labels) for logits in (one, other))
    # Above 0 the first is better: of NLL and Brier less is.
    sign = {"nll": -1, "brier": -1}
    gains = {f"gain {name}": sign.get(name, 1) * (own[name] - others[name]) for name in GAINS}
    return own | gains


GAINS = ("top1", "top5", "macro_f1", "nll", "brier")


def _figures(logits: Floats, labels: Int64) -> dict[str, float]:
    """Of a whole population, without intervals."""
    scores = metrics.image_scores(logits, labels)
    confusion = metrics.confusion_matrix(labels, scores.predicted, logits.shape[1])
    kept = metrics.selective_curve(scores.confidence, scores.correct)
    return {
        "top1": float((scores.rank < 1).mean()),
        "top5": float((scores.rank < 5).mean()),
        "macro_f1": metrics.macro_f1(confusion),
        "balanced_accuracy": metrics.balanced_accuracy(confusion),
        "nll": float(scores.loss.mean()),
        "brier": float(scores.brier.mean()),
        "ece": metrics.calibration_error(
            metrics.reliability_curve(scores.confidence, scores.correct, Evaluate().calibration_bins)
        ),
        "aurc": metrics.risk_coverage_area(kept),
        "selective_top1_80": metrics.accuracy_at(kept, intervals.COVERAGE),
    }


def covered(of: Population, images: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """One test set: whether each interval holds the truth (of the classes: in how many), and both ECEs' errors."""
    rows = np.random.default_rng([seed, 2]).integers(0, len(of.labels), images)
    labels, one, settings = of.labels[rows], of.one[rows], Evaluate(seed=seed)
    found: dict[str, float] = intervals.figures(one, labels, settings)
    found |= {f"gain {name}": value for name, value in intervals.gain(one, of.other[rows], labels, settings).items()}
    held = {name: float(found[f"{name}_low"] <= true <= found[f"{name}_high"]) for name, true in of.truth.items()}
    confusion = metrics.confusion_matrix(labels, metrics.predicted_classes(one), one.shape[1])
    for name, true in (
        ("worst class: recall of the one picked", of.per_class.recall[metrics.worst_class(confusion)]),
        ("worst class: lowest recall of all", of.per_class.recall.min()),
    ):
        held[name] = float(found["worst_class_recall_low"] <= true <= found["worst_class_recall_high"])
    ends = intervals.class_intervals(confusion, settings.confidence)
    for name in ("recall", "precision", "f1"):
        low, high = getattr(ends, f"{name}_low"), getattr(ends, f"{name}_high")
        held[f"{name} of a class"] = _share(low, getattr(of.per_class, name), high)
    return held, {name: found[name] - of.truth["ece"] for name in ("ece", "ece_debiased")}


def _share(low: Float64, truth: Float64, high: Float64) -> float:
    """Of the intervals that there are, those that hold the truth."""
    there = ~np.isnan(low)
    return float(((low <= truth) & (truth <= high))[there].mean())


def measured(model: Model, classes: int, images: int, draws: int) -> dict[str, Any]:
    """A column of the table: coverage of each interval, and the mean error of both ECEs."""
    of, held, errors = population(model, classes), defaultdict(list), defaultdict(list)
    for seed in range(draws):
        each, off = covered(of, images, seed)
        for name, value in each.items():
            held[name].append(value)
        for name, value in off.items():
            errors[name].append(value)
    return {
        "model": model.name, "classes": classes, "images": images, "draws": draws, "top1": of.truth["top1"],
        "ece": of.truth["ece"],
        "coverage": {name: float(np.mean(values)) for name, values in held.items()},
        "error": {name: float(np.mean(values)) for name, values in errors.items()},
    }  # fmt: skip


def contradicted(column: Mapping[str, Any]) -> list[str]:
    """Intervals whose coverage lies outside NOMINAL by more than the chance of these draws explains."""
    missed: list[str] = []
    if (1 - column["top1"]) * column["images"] < FEWEST_ERRORS:
        return missed
    for name in CLAIMED:
        share, draws = column["coverage"][name], column["draws"]
        low, high = wilson(share * draws, draws, 0.99)
        if high < NOMINAL[0] or low > NOMINAL[1]:
            missed.append(f"{name}: {100 * share:.1f} %, {column['model']}, {column['images']} images, "
                          f"{column['classes']} classes")  # fmt: skip
    return missed


def table(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: a row per interval, what lies outside NOMINAL in bold."""

    def row(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def coverage(share: float) -> str:
        text = f"{100 * share:.1f}"
        return text if NOMINAL[0] <= share <= NOMINAL[1] else f"**{text}**"

    return [
        row("model", [each["model"] for each in columns]),
        row("---", ["---:"] * len(columns)),
        *(row(name, [f"{each[key]:,}" for each in columns]) for name, key in (
            ("images", "images"), ("classes", "classes"), ("test sets", "draws"))),
        *(row(name, [f"{100 * each[key]:.1f} %" for each in columns]) for name, key in (
            ("true top-1", "top1"), ("true ECE", "ece"))),
        *(row(name, [coverage(each["coverage"][name]) for each in columns]) for name in columns[0]["coverage"]),
        *(row(f"mean error of {name}, points", [f"{100 * each['error'][name]:+.2f}" for each in columns])
          for name in columns[0]["error"]),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 with --check where a claimed coverage is contradicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="test sets of each population")
    parser.add_argument("--images", type=int, nargs="+", default=[500, 2000], help="in a test set")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--models", nargs="+", choices=[each.name for each in MODELS], metavar="NAME",
                        default=[each.name for each in MODELS], help="all of them: %(choices)s")  # fmt: skip
    parser.add_argument("--json", type=Path, help="writes the columns there too")
    parser.add_argument("--check", action="store_true", help="ends with 1 where a claimed coverage is contradicted")
    options = parser.parse_args(arguments)
    chosen = [each for each in MODELS if each.name in options.models]
    columns = [
        measured(model, classes, images, options.draws)
        for images in options.images for classes in options.classes for model in chosen
    ]  # fmt: skip
    print("\n".join(table(columns)))
    if options.json:
        options.json.write_text(json.dumps(columns, indent=1), encoding="utf-8")
    missed = [line for column in columns for line in contradicted(column)]
    print("\n".join(f"outside 93 to 97 %: {line}" for line in missed))
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
