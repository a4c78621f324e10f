"""Stage `register`: models/finetuned -> a version in MLflow's registry, and the receipt models/registered.json.

A model whose sha256 is registered already ends as `unchanged`. Everything else that a registration makes can be made
again, and the tag `model.sha256` is the last that a version gets. So one that died midway leaves no more than a version
without that tag (it has `registering` instead), which the next run removes before it starts from the beginning.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import tracking
from stages.command import StageError, run
from stages.files import sha256, write_json, write_text
from stages.params.evaluate import Evaluate
from stages.params.gate import Gate
from stages.params.load import load_section, params_path, read_params
from stages.params.register import Register

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from mlflow.entities import Run
    from numpy.typing import NDArray

    from stages.evaluation.gate import Answers
    from stages.model_card import Candidate, Review

logger = logging.getLogger(__name__)

MODEL = Path("models/finetuned")
RECEIPT = Path("models/registered.json")
REPORTS = Path("reports")
PREDICTIONS = REPORTS / "predictions.parquet"
SERVING = Path(__file__).with_name("serving.py")
REQUIREMENTS = ("mlflow", "torch", "torchvision", "pillow", "safetensors", "pandas", "numpy")
"""What stages/serving.py imports, pinned as installed here."""
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


def register(name: str, model_sha256: str, gate: Gate, confidence: float) -> tracking.Version:
    """Registers the model under `name` as its newest version, with the alias `challenger`.

    Raises:
        StageError: the served model does not answer as the evaluation did, or MLflow failed.
    """
    with _fresh_process() as fresh:
        _remove_unfinished(name)
        run = tracking.find_run(model_sha256) or _run_from_files(model_sha256)
        source = tracking.log_model(run, SERVING, MODEL, OUTPUT, _requirements(), {tracking.SHA256: model_sha256})
        try:
            latency_ms = _ask(fresh, source)
        except StageError:
            tracking.delete_model(source)
            raise
    candidate = _candidate(model_sha256, confidence, latency_ms)
    review = _review(name, candidate, gate)
    _log_files(name, run, candidate, review)
    return _enter(name, run, source, candidate, review)


def _remove_unfinished(name: str) -> None:
    for version in tracking.versions(name):
        if "registering" in version.tags and not version.sha256:
            logger.info("removing version %d of %s, whose registration was interrupted", version.number, name)
            tracking.delete_version(version)


def _run_from_files(model_sha256: str) -> "Run":
    """This server has not seen the training: the model was pulled, or tracking was off."""
    stored = REPORTS / "finetune/metrics.json"
    metrics = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    params = read_params()
    return tracking.create_finished_run(
        "finetune",
        {section: params[section] for section in ("model", "finetune", "training") if section in params},
        {tracking.SHA256: model_sha256, "source": "stored params and metrics"},
        metrics.get("finetuned", {}).get("epochs", []),
    )


def _requirements() -> list[str]:
    # Without a build's local part (2.15.0+cu130): no index has that one.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


# ------------------------------------------------------------------------- the served model against the evaluation


@contextmanager
def _fresh_process() -> Iterator["subprocess.Popen[str]"]:
    """A process that will load the logged model, told which one once it is logged: its imports take as long as ours."""
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "CUDA_VISIBLE_DEVICES": "",  # what is timed is one thread of a CPU, the same everywhere
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "stages.register", "--answer"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(fresh: "subprocess.Popen[str]", source: str) -> tuple[float, float]:
    """Lets the fresh process load the logged model and answer for test images; returns latency (median, p95) in ms.

    Raises:
        StageError: it does not load, or answers otherwise than reports/predictions.parquet.
    """
    import numpy as np
    import pandas as pd

    images, expected = _test_images()
    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame({"image": images}).to_parquet(Path(folder, "images.parquet"))
        _, errors = fresh.communicate(json.dumps([source, folder]))
        if fresh.returncode:
            what = f"the logged model {source} does not load and answer; nothing was registered"
            raise StageError(f"{what}:\n{textwrap.indent(errors[-2000:], '  ')}")
        answers = json.loads(Path(folder, "answers.json").read_text(encoding="utf-8"))
    check_answers(answers, expected)
    median, p95 = np.percentile(answers["milliseconds"], [50, 95])
    return float(median), float(p95)


def check_answers(answers: dict[str, Any], expected: "NDArray[np.float64]") -> None:
    """Compares the served model's answers with the evaluation's.

    Args:
        answers: `class_id` and `probability`, of all classes, for N images.
        expected: (N, classes) probabilities.

    Raises:
        StageError: they are further apart than `MOST_DIFFERENT`.
    """
    import numpy as np

    served = np.zeros_like(expected)
    for row, (class_ids, probabilities) in enumerate(zip(answers["class_id"], answers["probability"], strict=True)):
        served[row, class_ids] = probabilities
    difference = float(np.abs(served - expected).sum(axis=1).mean() / 2)
    same = f"top-1 equal on {100 * (served.argmax(axis=1) == expected.argmax(axis=1)).mean():.1f} %"
    logger.info("served as evaluated: %s of %d test images, probabilities %.4f apart", same, len(served), difference)
    if difference > MOST_DIFFERENT:
        raise StageError(
            f"the served model does not answer as the evaluation did: on {len(served)} test images its probabilities "
            f"are {difference:.3f} away on average (at most {MOST_DIFFERENT}), {same}. "
            f"stages/serving.py must prepare images as stages/data/loading.py does; nothing was registered"
        )


def _test_images() -> tuple[list[bytes], Any]:
    """Encoded test images spread over the test split, and what the evaluation said: (N, classes) probabilities."""
    import numpy as np

    from stages.data.loading import read_samples
    from stages.data.shard_sets import shard_sets
    from stages.evaluation.metrics import log_probabilities

    samples = read_samples(list(shard_sets("finetune")), "test")
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(ASKED, len(samples))).astype(np.int64))
    logits = _predictions().set_index("key")["logits"]
    missing = [samples.key[i] for i in chosen if samples.key[i] not in logits.index]
    if missing or not len(chosen):
        what = f"no prediction for {missing[0]}" if missing else "no test images"
        raise StageError(f"{PREDICTIONS}: {what} in data/shards/finetune; `dvc repro evaluate` makes it anew")
    expected = np.stack([logits[samples.key[i]] for i in chosen])
    return [samples.jpeg(i) for i in chosen], np.exp(log_probabilities(expected))


def answer() -> None:
    """The fresh process: reads [model, folder] from stdin, answers images.parquet there, times single predictions."""
    tracking.open_client()
    import mlflow
    import pandas as pd
    import torchvision  # noqa: F401  what the model will import, while the stage is still logging it

    source, folder = json.load(sys.stdin)
    model = mlflow.pyfunc.load_model(source)
    images = pd.read_parquet(Path(folder, "images.parquet"))
    answers = model.predict(images, params={"top_k": 1_000_000})
    milliseconds = []
    for i in range(TIMED + 3):
        began = time.perf_counter()
        model.predict(images.iloc[[i % len(images)]])
        milliseconds.append(1000 * (time.perf_counter() - began))
    content = {column: list(answers[column]) for column in OUTPUT} | {"milliseconds": milliseconds[3:]}
    Path(folder, "answers.json").write_text(json.dumps(content), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ gate and version


def _candidate(model_sha256: str, confidence: float, latency_ms: tuple[float, float]) -> "Candidate":
    from stages.data.facts import read_table
    from stages.model_card import Batch, Candidate

    quarantine = read_table(Path("data/quarantine.parquet"))
    sets = [(role, each) for role in ("pretrain", "finetune") for each in tracking.shard_sets(role)]
    return Candidate(
        sha256=model_sha256,
        config=json.loads((MODEL / "config.json").read_text(encoding="utf-8")),
        metrics=_metrics(),
        predictions=_predictions(),
        quarantined={str(reason): int(n) for reason, n in quarantine["reason"].value_counts().items()},
        batches=[Batch(each.batch, role, each.counts) for role, each in sets],
        confidence=confidence,
        git=tracking.git_tags(),
        latency_ms=latency_ms,
    )


def _predictions() -> "pd.DataFrame":
    import pandas as pd

    return pd.read_parquet(PREDICTIONS)


def _metrics() -> dict[str, Any]:
    return json.loads((REPORTS / "metrics.json").read_text(encoding="utf-8"))


def _review(name: str, candidate: "Candidate", gate: Gate) -> "Review":
    """The verdict against the version in force (`serving`, else `champion`); without one, the floors decide."""
    from stages.evaluation.gate import answers_of, judge
    from stages.model_card import Review

    in_force = tracking.version_by_alias(name, "serving") or tracking.version_by_alias(name, "champion")
    answers, predicted = _answers(in_force) if in_force else (None, None)
    try:
        verdict = judge(
            answers_of(candidate.sha256, candidate.predictions),
            candidate.metrics["test"],
            (MODEL / "model.safetensors").stat().st_size,
            answers,
            gate,
        )
    except (KeyError, ValueError) as error:
        raise StageError(
            f"{REPORTS}/metrics.json, {PREDICTIONS}: {error}; `dvc repro -f evaluate` makes both"
        ) from error
    against = f"version {in_force.number}" if in_force else ""
    return Review(verdict, against, predicted)


def _answers(version: tracking.Version) -> "tuple[Answers, pd.DataFrame | None]":
    """What a version said to its test images, and all its predictions; no answers and None where they are gone."""
    import numpy as np
    import pandas as pd

    from stages.evaluation.gate import Answers, answers_of

    why = "its run holds none, or is gone"
    with tempfile.TemporaryDirectory() as folder:
        path = tracking.download(version.run_id, PREDICTIONS.as_posix(), Path(folder))
        try:
            if path:
                predicted = pd.read_parquet(path)
                return answers_of(version.sha256, predicted), predicted
        except (KeyError, ValueError, OSError) as error:
            why = f"those of its run cannot be read: {error}"
    # The gate then says `inconclusive`: a version that cannot be compared with is no reason to pass.
    logger.warning("warning: no predictions of version %d to compare with (%s)", version.number, why)
    return Answers(version.sha256, (), np.empty(0, np.int64), np.empty(0, np.bool_)), None


def _enter(name: str, run: "Run", source: str, candidate: "Candidate", review: "Review") -> tracking.Version:
    from stages.model_card import render_card

    median, p95 = candidate.latency_ms
    figures = tracking.flatten(candidate.metrics) | {"latency.median_ms": median, "latency.p95_ms": p95}
    tracking.log_metrics(run, figures, source)
    tags = {"gate": review.verdict.result, "data.fingerprint": tracking.data_fingerprint(), **candidate.git}
    tags |= {"latency.median_ms": f"{median:.1f}", "latency.p95_ms": f"{p95:.1f}"}
    card = render_card(candidate, review, _links(name, run))
    version = tracking.create_version(
        name, _about(name), source, run.info.run_id, tags | {"registering": candidate.sha256}, card
    )
    tracking.set_alias(version, "challenger")
    tracking.finish_version(version, candidate.sha256)
    return version


def _links(name: str, run: "Run") -> dict[str, str]:
    pages = {
        "evaluation report": "report.html",
        "validation": "validation.html",
        "comparison page": f"{_own_folder(name)}/review.html",
    }
    return {
        "run": tracking.run_link(run),
        **{label: tracking.artifact_link(run, page) for label, page in pages.items()},
    }


def _own_folder(name: str) -> str:
    """Where a run keeps what is of one registration: its model may be registered under several names."""
    return f"registered/{name}"


def _about(name: str) -> str:
    return (
        f"Image classifier **{name}**, made by Synset. Each version's page carries its model card.\n\n"
        "`challenger` is the newest candidate. Set `champion` on the version that you want; `serving` is in force, and "
        "`previous` was before it."
    )


def _log_files(name: str, run: "Run", candidate: "Candidate", review: "Review") -> None:
    """Everything that a reviewer or a later comparison may want, as artifacts of the run."""
    from stages.model_card import render_review

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = folder / _own_folder(name)
        own.mkdir(parents=True)
        write_json(own / "gate.json", review.verdict.to_dict())
        write_text(own / "review.html", render_review(candidate, review))
        for path in (params_path(), Path("dvc.lock"), REPORTS / "report.html", REPORTS / "validation.html"):
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        for path in (PREDICTIONS, *REPORTS.rglob("*.json")):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        tracking.log_files(run, folder)


def main() -> None:
    """Registers models/finetuned unless it is registered, and writes the receipt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().answer:
        answer()
        return
    name = load_section("register", Register).name
    gate = load_section("gate", Gate)
    confidence = load_section("evaluate", Evaluate).confidence
    model_sha256 = sha256(MODEL / "model.safetensors")
    if tracking.enabled():
        with tracking.reachable():
            _register_once(name, model_sha256, gate, confidence)
    else:
        logger.warning("warning: SYNSET_TRACKING=off, so nothing is registered; later: `dvc repro -f -s register`")
    write_json(RECEIPT, {"name": name, "sha256": model_sha256})


def _register_once(name: str, model_sha256: str, gate: Gate, confidence: float) -> None:
    if found := tracking.find_version(name, model_sha256):
        print(f"unchanged: {name} version {found.number} has these weights")
        return
    version = register(name, model_sha256, gate, confidence)
    print(f"registered {name} version {version.number}; `make ui` shows it")


if __name__ == "__main__":
    run(main)
