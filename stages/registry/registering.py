"""Registers models/finetuned: logs it, lets it predict once, takes the gate, and enters the version."""

import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.evaluation.metrics import log_probabilities
from stages.evaluation.predictions import (
    evenly_spaced,
    read_predictions,
    read_test_samples,
    version_predictions,
)
from stages.params.gate import Gate
from stages.registry import artifacts, gate_review, lineage, logged_models, model_process, recording, records, versions
from stages.registry.card.model_card import render_card
from stages.registry.card.review_page import write_verdict
from stages.registry.gate_review import BatchCounts, Candidate, Review
from stages.registry.links import artifact_link, run_link
from stages.registry.mlflow_types import Run
from stages.registry.runs import flatten
from stages.registry.tags import (
    CHALLENGER,
    COMMIT,
    DATA_FINGERPRINT,
    IN_FORCE,
    LATENCY,
    LATENCY_P95,
    MACHINE,
    MODEL_SHA256,
    REGISTERING,
    RUN_SOURCE,
    UNFINISHED,
)
from stages.registry.versions import COMMIT_TO_COME, Version
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.params_file import params_path, read_params
from stages.runtime.tables import read_table

logger = logging.getLogger(__name__)

SERVED_MODEL = Path(__file__).with_name("served_model.py")
REQUIREMENTS = ("mlflow", "torch", "torchvision", "pillow", "safetensors", "pandas", "numpy")
"""What served_model.py imports, pinned as installed here."""
OUTPUT = {"class_id": "long", "name": "string", "probability": "double"}

COMPARED = 64
"""Test images on which the served model is compared with the evaluation."""
MAX_MEAN_DISTANCE = 0.03
"""Up to which the two agree: total variation of the probabilities (half the sum over classes), mean over the images.

Evaluation may run under bf16 and with a GPU's decoder; the served model runs in float32. Measured on the sample: 0.002
as it is (bf16 against float32), 0.07 with the margin of the crop forgotten, 0.12 with ImageNet's normalisation or
without a crop, 0.8 with channels in the wrong order.
"""
TIMED = 40
"""Single predictions that are timed."""
CANARY = 16
"""Of the images compared, those kept with their predictions; `examine` repeats these before the version goes live."""


@dataclass(frozen=True)
class FirstPredictions:
    """What the served model predicted when it was loaded for the first time."""

    latency_ms: tuple[float, float]
    """Median and 95th percentile of one image."""
    canary: pd.DataFrame
    """key, image (encoded), probabilities (by class id)"""


def register_once(name: str, model_sha256: str, gate: Gate, confidence: float) -> None:
    """Registers the model under `name` unless a version has these weights; prints which of the two.

    Raises:
        StageError: as `register`.
    """
    if found := versions.find_version(name, model_sha256):
        print(f"unchanged: {name} version {found.number} has these weights")
        return
    version = register(name, model_sha256, gate, confidence)
    print(f"registered {name} version {version.number}; `make ui` shows it")


def register(name: str, model_sha256: str, gate: Gate, confidence: float) -> Version:
    """Registers the model under `name` as its newest version, with the alias `challenger` or, if unfinished, none.

    Raises:
        StageError: the served model does not predict as the evaluation did, or MLflow failed.
    """
    with model_process.fresh_process() as process:
        _remove_interrupted(name)
        run = lineage.find_run(model_sha256) or _run_from_files(model_sha256)
        source = logged_models.log_model(
            run, SERVED_MODEL, layout.FINETUNED, OUTPUT, _requirements(), {MODEL_SHA256: model_sha256}
        )
        try:
            first = _predict(process, source)
        except StageError:
            logged_models.delete_model(source)
            raise
    candidate = read_candidate(model_sha256, confidence, first.latency_ms)
    review = take_gate(name, candidate, gate, run)
    _log_files(name, run, review, first)
    return _enter(name, run, source, candidate, review)


def _remove_interrupted(name: str) -> None:
    for version in versions.list_versions(name):
        if REGISTERING in version.tags and not version.sha256:
            logger.info("removing version %d of %s, whose registration was interrupted", version.number, name)
            versions.delete_version(version)


def _run_from_files(model_sha256: str) -> Run:
    """A new run for a training that this server has not seen: the model was pulled, or tracking was off."""
    stored = layout.FINETUNE_REPORTS / "metrics.json"
    metrics = _json(stored) if stored.exists() else {}
    params = read_params()
    return recording.create_finished(
        "finetune",
        {section: params[section] for section in ("model", "finetune", "training") if section in params},
        {MODEL_SHA256: model_sha256, RUN_SOURCE: "stored params and metrics"},
        metrics.get("finetuned", {}).get("epochs", []),
    )


def _requirements() -> list[str]:
    # Without a build's local part (2.15.0+cu130): no index has that one.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


# ------------------------------------------------------------------------- the served model against the evaluation


def _predict(process: subprocess.Popen[str], source: str) -> FirstPredictions:
    """Lets the fresh process load the logged model and predict for test images.

    Raises:
        StageError: it does not load, or predicts otherwise than reports/predictions.parquet.
    """
    keys, images, expected = _test_images()
    try:
        served = model_process.predict(process, source, images, TIMED)
    except StageError as error:
        raise StageError(f"nothing was registered: {error}") from error
    check_served(served.probabilities, expected)
    rows = [(keys[i], images[i], served.probabilities[i]) for i in evenly_spaced(len(keys), CANARY)]
    median, p95 = np.percentile(served.milliseconds, [50, 95])
    return FirstPredictions((float(median), float(p95)), pd.DataFrame(rows, columns=["key", "image", "probabilities"]))


def check_served(served: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """Compares the served model's probabilities (N, classes) with the evaluation's.

    Raises:
        StageError: they are further apart than `MAX_MEAN_DISTANCE`.
    """
    distance = float(np.abs(served - expected).sum(axis=1).mean() / 2)
    same = f"top-1 equal on {100 * (served.argmax(axis=1) == expected.argmax(axis=1)).mean():.1f} %"
    logger.info("served as evaluated: %s of %d test images, probabilities %.4f apart", same, len(served), distance)
    if distance > MAX_MEAN_DISTANCE:
        raise StageError(
            f"the served model does not answer as the evaluation did: on {len(served)} test images its probabilities "
            f"are {distance:.3f} away on average (at most {MAX_MEAN_DISTANCE}), {same}. "
            f"stages/registry/served_model.py must prepare images as stages/data/shards does; nothing was registered"
        )


def _test_images() -> tuple[list[str], list[bytes], NDArray[np.float64]]:
    """Keys of test images spread over the split, the images, and the evaluation's probabilities (N, classes)."""
    samples = read_test_samples()
    chosen = evenly_spaced(len(samples), COMPARED)
    keys = [samples.key[i] for i in chosen]
    logits = read_predictions(layout.PREDICTIONS).set_index("key")["logits"]
    missing = [key for key in keys if key not in logits.index]
    if missing or not keys:
        what = f"no prediction for {missing[0]}" if missing else "no test images"
        raise StageError(f"{layout.PREDICTIONS}: {what} in data/shards/finetune; `dvc repro evaluate` makes it anew")
    expected = np.stack([logits[key] for key in keys])
    return keys, [samples.jpeg(i) for i in chosen], np.exp(log_probabilities(expected))


# ------------------------------------------------------------------------------------------------ gate and version


def read_candidate(model_sha256: str, confidence: float, latency_ms: tuple[float, float]) -> Candidate:
    """The model of this checkout, with what the earlier stages say of it."""
    quarantine = read_table(layout.QUARANTINE)
    sets = [(role, shards) for role in ("pretrain", "finetune") for shards in lineage.training_data(role)]
    return Candidate(
        sha256=model_sha256,
        config=_json(layout.FINETUNED / layout.CONFIG),
        metrics=_json(layout.METRICS),
        quarantined={str(reason): int(n) for reason, n in quarantine["reason"].value_counts().items()},
        batches=[BatchCounts(shards.batch, role, shards.counts) for role, shards in sets],
        confidence=confidence,
        git={COMMIT: COMMIT_TO_COME} if _unfinished() else lineage.git_tags(),
        latency_ms=latency_ms,
        validation=_json(layout.VALIDATION),
    )


def _unfinished() -> str:
    """The flow that commits this model and names its commit later; empty where none does."""
    return os.environ.get("SYNSET_UNFINISHED", "")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def take_gate(name: str, candidate: Candidate, gate: Gate, run: Run) -> Review:
    """The verdict against the version in force (`serving`, else `champion`); without one, the floors decide.

    Raises:
        StageError: the version in force has no known weights, or metrics and predictions are not of one evaluation.
    """
    aliased = (versions.version_by_alias(name, alias) for alias in IN_FORCE)
    in_force = next((version for version in aliased if version), None)
    if in_force and not in_force.sha256:
        raise StageError(
            f"version {in_force.number} of {name}, which is in force, has no tag {MODEL_SHA256}, so no verdict can "
            f"name it. Set the tag again (its run has it); nothing was registered"
        )
    weights = (layout.FINETUNED / layout.WEIGHTS).stat().st_size, candidate.latency_ms[0]
    classes = candidate.config["classes"]
    try:
        table = read_predictions(layout.PREDICTIONS)
        predicted = version_predictions(candidate.sha256, table)
        against = None
        if in_force:
            shards = [each.folder for each in lineage.training_data("finetune")]
            against = in_force, gate_review.predictions_of(in_force, table, classes, shards)
        figures = candidate.metrics["test"]
        return gate_review.review(name, predicted, figures, weights, against, classes, gate, run.info.run_id)
    except (KeyError, ValueError) as error:
        raise StageError(
            f"{layout.METRICS}, {layout.PREDICTIONS}: {error}; `dvc repro -f evaluate` makes both"
        ) from error


def _enter(name: str, run: Run, source: str, candidate: Candidate, review: Review) -> Version:
    """Creates the version; its tag `model.sha256` comes last."""
    median, p95 = candidate.latency_ms
    logged_models.log_metrics(run, flatten(candidate.metrics) | {LATENCY: median, LATENCY_P95: p95}, source)
    tags = gate_review.verdict_tags(review.verdict) | {DATA_FINGERPRINT: lineage.data_fingerprint()}
    tags |= {LATENCY: f"{median:.1f}", LATENCY_P95: f"{p95:.1f}"}
    tags |= {MACHINE: run.data.tags[MACHINE]} if MACHINE in run.data.tags else {}
    tags |= {UNFINISHED: _unfinished()} if _unfinished() else candidate.git
    card = render_card(candidate, review, _links(name, run))
    version = versions.create_version(
        name, _about(name), source, run.info.run_id, tags | {REGISTERING: candidate.sha256}, card
    )
    gate_review.count_decision(name, review.verdict)
    if not _unfinished():
        versions.set_alias(version, CHALLENGER)
    versions.finish_version(version, candidate.sha256)
    return version


def _links(name: str, run: Run) -> dict[str, str]:
    pages = {
        "evaluation report": layout.REPORT_PAGE.name,
        "validation": layout.VALIDATION_PAGE.name,
        "comparison page": f"{records.own_folder(name)}/{records.REVIEW}",
    }
    return {"run": run_link(run)} | {label: artifact_link(run, page) for label, page in pages.items()}


def _about(name: str) -> str:
    return (
        f"Image classifier **{name}**, made by Synset. Each version's page carries its model card.\n\n"
        "`challenger` is the newest candidate. Set `champion` on the version that you want; `serving` is in force, and "
        "`previous` was before it."
    )


def _log_files(name: str, run: Run, review: Review, first: FirstPredictions) -> None:
    """Everything that a reviewer or a later comparison may want, as artifacts of the run."""
    at_root = (params_path(), layout.DVC_YAML, layout.DVC_LOCK, layout.REPORT_PAGE, layout.VALIDATION_PAGE)
    parts = (layout.REPORTS, layout.PLOTS, layout.PRETRAIN_REPORTS, layout.FINETUNE_REPORTS)
    made = [path for part in parts for ending in ("csv", "json") for path in part.glob(f"*.{ending}")]
    targets = {path: path.name for path in at_root if path.exists()}
    targets |= {path: path.as_posix() for path in (layout.PREDICTIONS, *made)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path, target in targets.items():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / target)
        own = folder / records.own_folder(name)
        write_verdict(review, own)
        first.canary.to_parquet(own / records.CANARY)
        artifacts.log_files(run, folder)
