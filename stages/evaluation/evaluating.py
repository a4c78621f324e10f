"""Evaluating: the models predict every image once, each evaluator measures, and reports/ is written."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.samples.shard_sets import shard_sets
from stages.evaluation.evaluator import DIGITS, EvaluationInputs, Evaluator, Result, rounded
from stages.evaluation.evaluators import (
    accuracy,
    calibration,
    confusion,
    curves,
    data,
    fresh,
    galleries,
    label_errors,
    per_class,
    robustness,
    selective,
    slices,
)
from stages.evaluation.evaluators.gallery_choice import choose
from stages.evaluation.inference import ImageFormat, nearest_class_mean, predict
from stages.evaluation.predictions import Predictions, check_complete, write_predictions
from stages.evaluation.report import page
from stages.evaluation.training_pass import predict_training_images
from stages.params.evaluate import Evaluate
from stages.params.training.training import Training
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import replaced_directory, replaced_file, sha256, write_json, write_text
from stages.training.networks.devices import set_up
from stages.training.networks.models import load_classifier

logger = logging.getLogger(__name__)

EVALUATORS: tuple[Evaluator, ...] = (
    accuracy,
    fresh,
    slices,
    per_class,
    confusion,
    calibration,
    selective,
    robustness,
    curves,
    galleries,
    label_errors,
    data,
)
"""In the order of the report and of reports/metrics.json."""


def evaluate(settings: Evaluate, training: Training) -> None:
    """Reads shards and models, writes all files of reports/ that `evaluate` makes.

    Raises:
        StageError: no labelled images, shards that are not the accepted images, or no model of these classes.
    """
    sets = shard_sets("finetune")
    train, test, later = (read_samples(sets, split).labelled() for split in ("train", "test", "fresh"))
    if not len(test):
        raise StageError(
            "data/shards/finetune holds no labelled test image, so there is nothing to evaluate on; see "
            "`split.test_fraction` in params.yaml"
        )
    if not len(train):
        raise StageError(
            "data/shards/finetune holds no labelled training image, of which class means are made; see `split` in "
            "params.yaml"
        )
    check_complete({"test": test, "fresh": later}, layout.ACCEPTED / "finetune")
    inputs = predictions_of(train, test, later, settings, training)
    figures = write(inputs, {each.name: each.measure(inputs) for each in EVALUATORS})
    logger.info("evaluate: top-1 %.3f on %d test images", figures["test"]["top1"], len(test))


def predictions_of(
    train: Samples, test: Samples, later: Samples, settings: Evaluate, training: Training
) -> EvaluationInputs:
    """Runs every model once: three on test, the fine-tuned one on fresh, it and the backbone on train."""
    config = _config()
    compute = set_up(training)
    folders = {"finetuned": layout.FINETUNED, "backbone": layout.BACKBONE}
    if (layout.SCRATCH / layout.WEIGHTS).is_file():
        folders["scratch"] = layout.SCRATCH
    models = {name: load_classifier(folder, compute.device)[0] for name, folder in folders.items()}
    for model in models.values():
        compute.place(model)
    finetuned = {"finetuned": models["finetuned"]}
    image = ImageFormat(config["image_size"], config["resize"], settings.batch_size)

    on_test = predict(test, models, image, compute, featured=["backbone"])
    predicted = Predictions(test, on_test["finetuned"].logits)
    chosen = choose(predicted.scores, test.label, settings.gallery)
    queries = predict(test.at(chosen.mistakes), finetuned, image, compute, featured=["finetuned"])["finetuned"].features
    of_train = predict_training_images(train, models, queries, len(config["classes"]), image, compute)
    on_fresh = predict(later, finetuned, image, compute)["finetuned"].logits
    return EvaluationInputs(
        settings=settings,
        config=config,
        model=models["finetuned"],
        compute=compute,
        train=train,
        test=replace(
            predicted,
            before=nearest_class_mean(on_test["backbone"].features, of_train.means),
            scratch=on_test["scratch"].logits if "scratch" in models else None,
        ),
        fresh=Predictions(later, on_fresh.reshape(len(later), len(config["classes"]))),
        training=of_train,
        chosen=chosen,
    )


def _config() -> dict[str, Any]:
    """Of the fine-tuned model."""
    path, classes = layout.FINETUNED / layout.CONFIG, layout.classes("finetune")
    if not path.is_file():
        raise StageError(f"{path} is missing, so there is no model to evaluate; `dvc repro finetune` makes it")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config["classes"] != json.loads(classes.read_text(encoding="utf-8")):
        raise StageError(f"{path} and {classes} name other classes; `dvc repro finetune` makes the model anew")
    return config


def write(inputs: EvaluationInputs, results: Mapping[str, Result]) -> dict[str, Any]:
    """Writes predictions, tables, plots, page and figures; returns the figures as they are written.

    Args:
        results: by the evaluators' names, in the order of the report.
    """
    figures = {key: value for result in results.values() for key, value in rounded(result.figures).items()}
    write_predictions(inputs.test, inputs.fresh, layout.PREDICTIONS)
    csv: dict[str, Any] = {"index": False, "float_format": f"%.{DIGITS}f", "lineterminator": "\n"}
    for result in results.values():
        for name, table in result.tables.items():
            with replaced_file(layout.REPORTS / f"{name}.csv") as aside:
                table.to_csv(aside, **csv)
    with replaced_directory(layout.PLOTS) as folder:
        for result in results.values():
            for name, table in result.plots.items():
                table.to_csv(folder / f"{name}.csv", **csv)
    weights = sha256(layout.FINETUNED / layout.WEIGHTS)
    write_text(layout.REPORT_PAGE, page.render(inputs, results, figures, weights))
    write_json(layout.METRICS, figures)
    return figures
