"""Stage `register`: models/finetuned -> a version in MLflow's registry, and the receipt models/registered.json.

A model whose sha256 is registered already ends as `unchanged`. Everything else that a registration makes can be made
again, and the tag `model.sha256` is the last that a version gets. So one that died midway leaves no more than a version
without that tag (it has `registering` instead), which the next run removes before it starts from the beginning.

Within retraining (SYNSET_UNFINISHED=retrain) the commit of the model is still to come: the version has neither alias
nor commit, and is tagged `unfinished` until retraining names its commit.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.params.evaluate import Evaluate
from stages.params.gate import Gate
from stages.params.register import Register
from stages.registry import artifacts, gate_review, lineage, logged_models, model_process, recording, versions
from stages.registry.client import enabled, reachable
from stages.registry.gate_review import LATENCY, METRICS, PREDICTIONS, own_folder
from stages.registry.links import artifact_link, run_link
from stages.registry.runs import flatten
from stages.registry.tags import MODEL_SHA256, UNFINISHED
from stages.registry.versions import COMMIT_TO_COME, Version
from stages.runtime.command import StageError, run
from stages.runtime.files import sha256, write_json
from stages.runtime.params_file import load_section, params_path, read_params

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from mlflow.entities import Run
    from numpy.typing import NDArray

    from stages.registry.gate_review import Candidate, Review

logger = logging.getLogger(__name__)

MODEL = Path("models/finetuned")
RECEIPT = Path("models/registered.json")
REPORTS = Path("reports")
SERVING = Path(__file__).parent / "registry/served_model.py"
REQUIREMENTS = ("mlflow", "torch", "torchvision", "pillow", "safetensors", "pandas", "numpy")
"""What stages/registry/served_model.py imports, pinned as installed here."""
OUTPUT = {"class_id": "long", "name": "string", "probability": "double"}

ASKED = 64
"""Test images on which the served model is compared with the evaluation."""
MOST_DIFFERENT = 0.03
"""Up to which the two agree: total variation of the probabilities (half the sum over classes), mean over the images.

Evaluation may run under bf16 and with a GPU's decoder; the served model runs in float32. Measured on the sample: 0.002
as it is (bf16 against float32), 0.07 with the margin of the crop forgotten, 0.12 with ImageNet's normalisation or
without a crop, 0.8 with channels in the wrong order.
"""
TIMED = 40
"""Single predictions that are timed."""
CANARY = 16
"""Of the images asked, those that are kept with the answers, to ask the same again before the version goes live."""


@dataclass(frozen=True)
class Answered:
    """What the served model said when it was asked for the first time."""

    latency_ms: tuple[float, float]
    """Median and 95th percentile of one image."""
    canary: "pd.DataFrame"
    """key, image (encoded), probabilities (by class id)"""


def register(name: str, model_sha256: str, gate: Gate, confidence: float) -> Version:
    """Registers the model under `name` as its newest version, with the alias `challenger` or, if unfinished, none.

    Raises:
        StageError: the served model does not answer as the evaluation did, or MLflow failed.
    """
    with model_process.fresh_process() as fresh:
        _remove_interrupted(name)
        run = lineage.find_run(model_sha256) or _run_from_files(model_sha256)
        source = logged_models.log_model(run, SERVING, MODEL, OUTPUT, _requirements(), {MODEL_SHA256: model_sha256})
        try:
            answered = _ask(fresh, source)
        except StageError:
            logged_models.delete_model(source)
            raise
    candidate = _candidate(model_sha256, confidence, answered.latency_ms)
    review = _review(name, candidate, gate, run)
    _log_files(name, run, review, answered)
    return _enter(name, run, source, candidate, review)


def _remove_interrupted(name: str) -> None:
    for version in versions.list_versions(name):
        if "registering" in version.tags and not version.sha256:
            logger.info("removing version %d of %s, whose registration was interrupted", version.number, name)
            versions.delete_version(version)


def _run_from_files(model_sha256: str) -> "Run":
    """This server has not seen the training: the model was pulled, or tracking was off."""
    stored = REPORTS / "finetune/metrics.json"
    metrics = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    params = read_params()
    return recording.create_finished(
        "finetune",
        {section: params[section] for section in ("model", "finetune", "training") if section in params},
        {MODEL_SHA256: model_sha256, "source": "stored params and metrics"},
        metrics.get("finetuned", {}).get("epochs", []),
    )


def _requirements() -> list[str]:
    # Without a build's local part (2.15.0+cu130): no index has that one.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


# ------------------------------------------------------------------------- the served model against the evaluation


def _ask(fresh: "subprocess.Popen[str]", source: str) -> Answered:
    """Lets the fresh process load the logged model and answer for test images.

    Raises:
        StageError: it does not load, or answers otherwise than reports/predictions.parquet.
    """
    import numpy as np
    import pandas as pd

    keys, images, expected = _test_images()
    try:
        said = model_process.ask(fresh, source, images, TIMED)
    except StageError as error:
        raise StageError(f"nothing was registered: {error}") from error
    check_answers(said.probabilities, expected)
    chosen = np.unique(np.linspace(0, len(keys) - 1, min(CANARY, len(keys))).astype(np.int64))
    rows = [(keys[i], images[i], said.probabilities[i]) for i in chosen]
    median, p95 = np.percentile(said.milliseconds, [50, 95])
    return Answered((float(median), float(p95)), pd.DataFrame(rows, columns=["key", "image", "probabilities"]))


def check_answers(served: "NDArray[np.float64]", expected: "NDArray[np.float64]") -> None:
    """Compares the served model's answers with the evaluation's: (N, classes) probabilities, both.

    Raises:
        StageError: they are further apart than `MOST_DIFFERENT`.
    """
    import numpy as np

    difference = float(np.abs(served - expected).sum(axis=1).mean() / 2)
    same = f"top-1 equal on {100 * (served.argmax(axis=1) == expected.argmax(axis=1)).mean():.1f} %"
    logger.info("served as evaluated: %s of %d test images, probabilities %.4f apart", same, len(served), difference)
    if difference > MOST_DIFFERENT:
        raise StageError(
            f"the served model does not answer as the evaluation did: on {len(served)} test images its probabilities "
            f"are {difference:.3f} away on average (at most {MOST_DIFFERENT}), {same}. "
            f"stages/registry/served_model.py must prepare images as stages/data/shards does; nothing was registered"
        )


def _test_images() -> tuple[list[str], list[bytes], Any]:
    """Keys of test images spread over the split, the images, and what the evaluation said: (N, classes)."""
    import numpy as np

    from stages.data.shards.loading.samples.index import read_samples
    from stages.data.shards.loading.samples.shard_sets import shard_sets
    from stages.evaluation.metrics import log_probabilities

    samples = read_samples(list(shard_sets("finetune")), "test")
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(ASKED, len(samples))).astype(np.int64))
    logits = _predictions().set_index("key")["logits"]
    missing = [samples.key[i] for i in chosen if samples.key[i] not in logits.index]
    if missing or not len(chosen):
        what = f"no prediction for {missing[0]}" if missing else "no test images"
        raise StageError(f"{PREDICTIONS}: {what} in data/shards/finetune; `dvc repro evaluate` makes it anew")
    expected = np.stack([logits[samples.key[i]] for i in chosen])
    keys = [samples.key[i] for i in chosen]
    return keys, [samples.jpeg(i) for i in chosen], np.exp(log_probabilities(expected))


# ------------------------------------------------------------------------------------------------ gate and version


def _candidate(model_sha256: str, confidence: float, latency_ms: tuple[float, float]) -> "Candidate":
    from stages.registry.gate_review import BatchCounts, Candidate
    from stages.runtime.tables import read_table

    quarantine = read_table(Path("data/quarantine.parquet"))
    sets = [(role, each) for role in ("pretrain", "finetune") for each in lineage.training_data(role)]
    return Candidate(
        sha256=model_sha256,
        config=_json(MODEL / "config.json"),
        metrics=_json(METRICS),
        quarantined={str(reason): int(n) for reason, n in quarantine["reason"].value_counts().items()},
        batches=[BatchCounts(each.batch, role, each.counts) for role, each in sets],
        confidence=confidence,
        git={"git.commit": COMMIT_TO_COME} if _unfinished() else lineage.git_tags(),
        latency_ms=latency_ms,
        validation=_json(REPORTS / "validation.json"),
    )


def _unfinished() -> str:
    """Who commits this model and names its commit later; empty where nobody does."""
    return os.environ.get("SYNSET_UNFINISHED", "")


def _predictions() -> "pd.DataFrame":
    import pandas as pd

    return pd.read_parquet(PREDICTIONS)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _review(name: str, candidate: "Candidate", gate: Gate, run: "Run") -> "Review":
    """The verdict against the version in force (`serving`, else `champion`); without one, the floors decide."""
    from stages.evaluation.predictions import version_predictions

    in_force = versions.version_by_alias(name, "serving") or versions.version_by_alias(name, "champion")
    if in_force and not in_force.sha256:
        raise StageError(
            f"version {in_force.number} of {name}, which is in force, has no tag {MODEL_SHA256}, so no verdict can "
            f"name it. Set the tag again (its run has it); nothing was registered"
        )
    weights = (MODEL / "model.safetensors").stat().st_size, candidate.latency_ms[0]
    classes = candidate.config["classes"]
    try:
        predicted = _predictions()
        answers = version_predictions(candidate.sha256, predicted)
        against = None
        if in_force:
            shards = [each.folder for each in lineage.training_data("finetune")]
            against = in_force, gate_review.answers(in_force, predicted, classes, shards)
        figures = candidate.metrics["test"]
        return gate_review.review(name, answers, figures, weights, against, classes, gate, run.info.run_id)
    except (KeyError, ValueError) as error:
        raise StageError(f"{METRICS}, {PREDICTIONS}: {error}; `dvc repro -f evaluate` makes both") from error


def _enter(name: str, run: "Run", source: str, candidate: "Candidate", review: "Review") -> Version:
    from stages.registry.card.model_card import render_card

    median, p95 = candidate.latency_ms
    figures = flatten(candidate.metrics) | {LATENCY: median, "latency.p95_ms": p95}
    logged_models.log_metrics(run, figures, source)
    tags = gate_review.verdict_tags(review.verdict) | {"data.fingerprint": lineage.data_fingerprint()}
    tags |= {LATENCY: f"{median:.1f}", "latency.p95_ms": f"{p95:.1f}"}
    tags |= {"machine": run.data.tags["machine"]} if "machine" in run.data.tags else {}
    tags |= {UNFINISHED: _unfinished()} if _unfinished() else candidate.git
    card = render_card(candidate, review, _links(name, run))
    version = versions.create_version(
        name, _about(name), source, run.info.run_id, tags | {"registering": candidate.sha256}, card
    )
    gate_review.count_decision(name, review.verdict)
    if not _unfinished():
        versions.set_alias(version, "challenger")
    versions.finish_version(version, candidate.sha256)
    return version


def _links(name: str, run: "Run") -> dict[str, str]:
    pages = {
        "evaluation report": "report.html",
        "validation": "validation.html",
        "comparison page": f"{own_folder(name)}/review.html",
    }
    return {
        "run": run_link(run),
        **{label: artifact_link(run, page) for label, page in pages.items()},
    }


def _about(name: str) -> str:
    return (
        f"Image classifier **{name}**, made by Synset. Each version's page carries its model card.\n\n"
        "`challenger` is the newest candidate. Set `champion` on the version that you want; `serving` is in force, and "
        "`previous` was before it."
    )


def _log_files(name: str, run: "Run", review: "Review", answered: Answered) -> None:
    """Everything that a reviewer or a later comparison may want, as artifacts of the run."""
    from stages.registry.card.review_page import write_verdict

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = folder / own_folder(name)
        own.mkdir(parents=True)
        write_verdict(review, own)
        answered.canary.to_parquet(own / "canary.parquet")
        for path in (
            params_path(),
            Path("dvc.yaml"),
            Path("dvc.lock"),
            REPORTS / "report.html",
            REPORTS / "validation.html",
        ):
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        parts, endings = (".", "plots", "pretrain", "finetune"), ("csv", "json")
        made = [path for part in parts for ending in endings for path in (REPORTS / part).glob(f"*.{ending}")]
        for path in (PREDICTIONS, *made):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        artifacts.log_files(run, folder)


def main() -> None:
    """Registers models/finetuned unless it is registered, and writes the receipt."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    name = load_section("register", Register).name
    gate = load_section("gate", Gate)
    confidence = load_section("evaluate", Evaluate).confidence
    model_sha256 = sha256(MODEL / "model.safetensors")
    if enabled():
        with reachable():
            _register_once(name, model_sha256, gate, confidence)
    else:
        logger.warning("warning: SYNSET_TRACKING=off, so nothing is registered; later: `dvc repro -f -s register`")
    write_json(RECEIPT, {"name": name, "sha256": model_sha256})


def _register_once(name: str, model_sha256: str, gate: Gate, confidence: float) -> None:
    if found := versions.find_version(name, model_sha256):
        print(f"unchanged: {name} version {found.number} has these weights")
        return
    version = register(name, model_sha256, gate, confidence)
    print(f"registered {name} version {version.number}; `make ui` shows it")


if __name__ == "__main__":
    run(main)
