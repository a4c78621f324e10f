"""evaluate: shards, models -> reports/: metrics.json, predictions.parquet, label_suspects.csv, plots/, report.html."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.samples.shard_sets import shard_sets
from stages.evaluation import metrics
from stages.evaluation.evaluators import galleries, slices
from stages.evaluation.evaluators.slices import Slice
from stages.evaluation.predictions import Predictions, check_complete, write_predictions
from stages.evaluation.report import page
from stages.evaluation.statistics import intervals
from stages.params.evaluate import Evaluate
from stages.params.training.training import Training
from stages.runtime.command import StageError, run
from stages.runtime.files import replaced_directory, sha256, write_json, write_text
from stages.runtime.params_file import load_section

if TYPE_CHECKING:
    from stages.evaluation.evaluators.robustness import Findings as Robust
    from stages.evaluation.evaluators.training_images import TrainingImages

logger = logging.getLogger(__name__)
MODELS = Path("models")
REPORTS = Path("reports")
ACCEPTED = Path("data/accepted")
QUARANTINE = Path("data/quarantine.parquet")
MOST_SLICES = 20
"""In reports/plots/slices.csv: more cannot be read in a plot."""
ROBUSTNESS = ["kind", "change", "top1", "low", "high", *(f"severity_{severity}" for severity in range(1, 6))]
"""Columns of reports/plots/robustness.csv."""
PER_CLASS = {
    "name": "class", "support": "support", "recall": "recall", "low": "recall_low", "high": "recall_high",
    "precision": "precision", "precision_low": "precision_low", "precision_high": "precision_high",
    "f1": "f1", "f1_low": "f1_low", "f1_high": "f1_high",
}  # fmt: skip
"""Columns of reports/plots/per_class.csv, as the report's rows call them and as the file does."""
SUSPECTS = ["key", "batch", "label", "suggested", "label_probability", "suggested_probability"]
"""Columns of reports/label_suspects.csv."""
DIGITS = 6
"""Of every figure written: what lies beyond is noise to a reader and differs between builds of numpy."""


@dataclass(frozen=True)
class Found:
    """What was asked of the models, but for the figures that are worked out from it."""

    test: Predictions
    fresh: Predictions
    training: "TrainingImages"
    suspects: np.ndarray
    """Places of training images that look mislabelled, the most suspicious first."""
    galleries: galleries.Galleries
    robustness: "Robust | None"
    """None where it is not wanted."""


def main() -> None:
    """Asks the models, then works out figures, plots and the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    settings = load_section("evaluate", Evaluate)
    training = load_section("training", Training)
    sets = list(shard_sets("finetune"))
    train, test, fresh = (read_samples(sets, split).labelled() for split in ("train", "test", "fresh"))
    if not len(test):
        raise StageError("data/shards/finetune holds no labelled test image, so there is nothing to evaluate on; "
                         "see `split.test_fraction` in params.yaml")  # fmt: skip
    if not len(train):
        raise StageError("data/shards/finetune holds no labelled training image, of which class means are made; see "
                         "`split` in params.yaml")  # fmt: skip
    check_complete({"test": test, "fresh": fresh}, ACCEPTED / "finetune")
    config = _config()
    found = _ask(train, test, fresh, config, settings, training)
    weak = find_slices(found, train, config, settings)
    figures = rounded(collect_metrics(found, weak, settings))
    write(found, train, weak, figures, config, settings)
    logger.info("evaluate: top-1 %.3f on %d test images", figures["test"]["top1"], len(test))


def _config() -> dict[str, Any]:
    path = MODELS / "finetuned/config.json"
    if not path.is_file():
        raise StageError(f"{path} is missing, so there is no model to evaluate; `dvc repro finetune` makes it")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    classes = json.loads(Path("data/classes/finetune.json").read_text(encoding="utf-8"))
    if config["classes"] != classes:
        raise StageError(
            f"{path} and data/classes/finetune.json name other classes; `dvc repro finetune` makes the model anew"
        )
    return config


def _ask(
    train: Samples, test: Samples, fresh: Samples, config: Mapping[str, Any], settings: Evaluate, training: Training
) -> Found:
    """All that models are asked: three of them on test, the fine-tuned one on fresh, it and the backbone on train."""
    from stages.evaluation.evaluators import training_images
    from stages.evaluation.inference import all_answers, nearest_class_mean
    from stages.training.networks.devices import set_up
    from stages.training.networks.models import load_classifier

    compute = set_up(training)
    has_scratch = (MODELS / "scratch/model.safetensors").is_file()
    names = ("finetuned", "backbone", *(("scratch",) if has_scratch else ()))
    models = {name: load_classifier(MODELS / name, compute.device)[0] for name in names}
    for model in models.values():
        compute.place(model)
    how: dict[str, Any] = {"image_size": config["image_size"], "resize": config["resize"]}
    how |= {"batch_size": settings.batch_size, "compute": compute}
    finetuned = models["finetuned"]

    on_test = all_answers(test, models, featured=["backbone"], **how)
    logits, labels = on_test["finetuned"].logits, test.label
    chosen = galleries.choose(logits, labels, settings.gallery)
    asked = all_answers(test.at(chosen.mistakes), {"": finetuned}, featured=[""], **how)[""].features
    seen = training_images.look(train, finetuned, models["backbone"], asked, len(config["classes"]), **how)
    suspects = training_images.suspects(seen, train.label, len(config["classes"]))
    on_fresh = all_answers(fresh, {"finetuned": finetuned}, **how)["finetuned"].logits
    robust = None
    if settings.robustness:
        from stages.evaluation.evaluators.robustness import measure

        robust = measure(
            finetuned, test, settings.robustness, image_size=config["image_size"], resize=config["resize"],
            settings=settings, compute=compute,
        )  # fmt: skip
    return Found(
        test=Predictions(
            test, logits, nearest_class_mean(on_test["backbone"].features, seen.means),
            on_test["scratch"].logits if has_scratch else None,
        ),
        fresh=Predictions(fresh, on_fresh.reshape(len(fresh), len(config["classes"]))),
        training=seen,
        suspects=suspects,
        galleries=galleries.make(
            chosen, finetuned, test, logits, train, seen, suspects, config, training.threads
        ),
        robustness=robust,
    )  # fmt: skip


def find_slices(found: Found, train: Samples, config: Mapping[str, Any], settings: Evaluate) -> list[Slice]:
    """Where the fine-tuned model is weaker than on the rest, over test and fresh together."""
    both = (found.test, found.fresh)
    keys = [key for each in both for key in each.samples.key]
    columns = ["key", "batch", "split", "width", "height", "bytes", "brightness", "contrast", "format", "mode"]
    files = sorted((ACCEPTED / "finetune").glob("*.parquet"))
    facts = pd.concat([pd.read_parquet(path, columns=columns) for path in files]).set_index("key").loc[keys]
    labels = np.concatenate([each.samples.label for each in both])
    right = np.concatenate([metrics.predicted_classes(each.finetuned) == each.samples.label for each in both])
    per_class = np.bincount(train.label, minlength=len(config["classes"]))
    return slices.slices(facts, right, labels, config["classes"], per_class, settings.confidence)


def collect_metrics(found: Found, weak: Sequence[Slice], settings: Evaluate) -> dict[str, Any]:
    """What reports/metrics.json holds, not rounded yet; NaN where a figure was not computed."""
    test, fresh = found.test, found.fresh
    labels = test.samples.label
    others = {"before": test.before, "scratch": test.scratch}
    figures: dict[str, Any] = {"test": intervals.figures(test.finetuned, labels, settings)}
    for name, logits in others.items():
        figures[name] = (
            dict.fromkeys(figures["test"], np.nan)
            if logits is None
            else intervals.figures(logits, labels, settings, calibrated=name != "before")
        )
    figures["gain"] = {
        name: intervals.gain(test.finetuned, logits, labels, settings, calibrated=name != "before")
        for name, logits in others.items()
        if logits is not None
    }
    figures["fresh"] = {
        name: intervals.figures(fresh.finetuned[rows], fresh.samples.label[rows], settings)
        | _gap_to_test(fresh.finetuned[rows], fresh.samples.label[rows], test, settings)
        for index, name in enumerate(fresh.samples.batch_names)
        if (rows := fresh.samples.batch == index).any()
    }
    figures["slices"] = slices.figures(weak, settings.confidence)
    figures["robustness"] = _in_short(found.robustness.figures) if found.robustness else None
    figures["data"] = {
        "accepted": sum(_rows(path) for path in ACCEPTED.rglob("*.parquet")),
        "quarantined": _rows(QUARANTINE),
        "label_suspects": len(found.suspects),
    }
    return figures


def _gap_to_test(logits: np.ndarray, labels: np.ndarray, test: Predictions, settings: Evaluate) -> dict[str, float]:
    """Top-1 on fresh images less that on test, two sets of different images."""
    hits, test_hits = (
        int((metrics.predicted_classes(said) == truth).sum())
        for said, truth in ((logits, labels), (test.finetuned, test.samples.label))
    )
    n, of_test = len(labels), len(test.samples)
    low, high = intervals.newcombe(hits, n, test_hits, of_test, settings.confidence)
    return {
        "gap_to_test": hits / n - test_hits / of_test, "gap_to_test_low": float(low), "gap_to_test_high": float(high),
    }  # fmt: skip


def _in_short(robustness: Mapping[str, Any]) -> dict[str, Any]:
    """Of corruptions their mean error alone: what each severity gave is in reports/plots/robustness.csv."""
    errors = {name: figures["error"] for name, figures in robustness["corruptions"].items()}
    return {**robustness, "corruptions": errors}


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def write(
    found: Found, train: Samples, weak: Sequence[Slice], figures: dict[str, Any], config: dict[str, Any],
    settings: Evaluate,
) -> None:  # fmt: skip
    findings = _findings(found, weak, figures, config, settings)
    write_predictions(found.test, found.fresh, REPORTS / "predictions.parquet")
    _write_suspects(found, train, config)
    _write_plots(found.test, findings)
    write_text(REPORTS / "report.html", page.render(findings))
    write_json(REPORTS / "metrics.json", figures)


def _findings(
    found: Found, weak: Sequence[Slice], figures: dict[str, Any], config: dict[str, Any], settings: Evaluate
) -> page.Findings:
    test = found.test
    predicted, labels = metrics.predicted_classes(test.finetuned), test.samples.label
    bins, scores = settings.calibration_bins, metrics.image_scores(test.finetuned, labels)
    noise = intervals.calibration_noise(test.finetuned, bins, settings.bootstrap, settings.seed)
    quarantine = pd.read_parquet(QUARANTINE, columns=["batch", "reason"])
    return page.Findings(
        classes=config["classes"],
        metrics=figures,
        confusion=metrics.confusion_matrix(labels, predicted, len(config["classes"])),
        reliability=metrics.reliability_curve(scores.confidence, scores.correct, bins),
        selective=metrics.selective_curve(scores.confidence, scores.correct),
        calibrated_ece=float(noise.mean()),
        slices=weak,
        galleries=found.galleries,
        robustness=found.robustness,
        curves=_curves(),
        data=_data_rows(_counts(quarantine["batch"])),
        reasons=_counts(quarantine["reason"]),
        config=config,
        sha256=sha256(MODELS / "finetuned/model.safetensors"),
        settings=settings.model_dump(),
    )


def _write_suspects(found: Found, train: Samples, config: Mapping[str, Any]) -> None:
    rows = as_rows(found, train, config["classes"])
    pd.DataFrame(rows, columns=SUSPECTS).to_csv(
        REPORTS / "label_suspects.csv", index=False, float_format=f"%.{DIGITS}f", lineterminator="\n"
    )


def as_rows(found: Found, train: Samples, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of reports/label_suspects.csv, the most suspicious first."""
    seen = found.training
    return [
        {
            "key": train.key[i], "batch": train.batch_names[train.batch[i]], "label": classes[train.label[i]],
            "suggested": classes[seen.suggested[i]], "label_probability": seen.own[i],
            "suggested_probability": seen.other[i],
        }
        for i in found.suspects
    ]  # fmt: skip


def _curves() -> dict[str, list[dict[str, float]]]:
    """Epochs by run, of what training has reported."""
    curves = {}
    pretrain, finetune = (_report(REPORTS / name / "metrics.json") for name in ("pretrain", "finetune"))
    for name, part in (("pretrain", pretrain), *((name, finetune.get(name, {})) for name in ("finetuned", "scratch"))):
        curves[name] = part.get("epochs", [])
    return curves


def _report(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _data_rows(quarantined: Mapping[str, int]) -> list[page.DataRow]:
    rows = []
    for path in sorted(ACCEPTED.glob("*/*.parquet"), key=lambda path: (path.parent.name == "finetune", path.name)):
        splits = _counts(pd.read_parquet(path, columns=["split"])["split"])
        rows.append(page.DataRow(path.stem, path.parent.name, splits, quarantined.get(path.stem, 0)))
    return rows


def _counts(values: pd.Series) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    counts = {str(value): int(n) for value, n in values.value_counts().items()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _write_plots(test: Predictions, findings: page.Findings) -> None:
    """CSV files as `dvc plots` draws them."""
    names = np.array(findings.classes)
    confusion = pd.DataFrame(
        {"actual": names[test.samples.label], "predicted": names[metrics.predicted_classes(test.finetuned)]}
    )
    rows = page.class_rows(findings.classes, findings.confusion, findings.settings["confidence"])
    robust = findings.robustness.figures if findings.robustness else None
    curve = findings.reliability
    bins = pd.DataFrame({"confidence": curve.confidence, "accuracy": curve.accuracy, "count": curve.count})
    epochs = pd.DataFrame([{"run": run} | dict(epoch) for run, each in findings.curves.items() for epoch in each])
    tables = {
        "slices": pd.DataFrame(
            [{"slice": each.name} | vars(each) for each in findings.slices[:MOST_SLICES]],
            columns=["slice", *(each.name for each in fields(Slice))],
        ),
        "confusion": confusion,
        "per_class": pd.DataFrame(rows, columns=list(PER_CLASS)).rename(columns=PER_CLASS),
        "reliability": bins[curve.count > 0],
        "selective": pd.DataFrame(
            page.selective_rows(findings.selective), columns=["coverage", "accuracy", "confidence"]
        ),
        "robustness": pd.DataFrame(page.robustness_rows(robust) if robust else [], columns=ROBUSTNESS),
        "curves": epochs.reindex(columns=["run", "epoch", *sorted(set(epochs.columns) - {"run", "epoch"})]),
    }
    with replaced_directory(REPORTS / "plots") as aside:
        for name, table in tables.items():
            table.to_csv(aside / f"{name}.csv", index=False, float_format=f"%.{DIGITS}f", lineterminator="\n")


def rounded(value: Any) -> Any:
    """Figures as they are written: rounded, null where not computed."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, int | np.integer):
        return int(value)
    return None if value is None or np.isnan(value) else round(float(value), DIGITS)


if __name__ == "__main__":
    run(main)
