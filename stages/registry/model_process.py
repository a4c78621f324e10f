"""A registered model predicts in a process of its own: two versions loaded in one process would both run the code of
the first. The process is this module: `python -m stages.registry.model_process` reads one request as JSON from stdin,
and writes what the model predicts into the folder that the request names.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.data.shards.loading.samples.index import read_samples
from stages.data.shards.loading.samples.shard_sets import read_index
from stages.registry.client import open_client, tracking_uri
from stages.registry.mlflow_setup import mlflow
from stages.runtime import layout
from stages.runtime.command import StageError, run
from stages.runtime.files import sha256, write_json
from stages.runtime.progress import progress, worker_count

logger = logging.getLogger(__name__)

ALL_CLASSES = 1_000_000
"""As `top_k`."""
BATCH = 64
ERROR = "error.txt"
SHARDS = "shards.json"
FACTS = "facts.json"
IMAGES, KEYS, PREDICTIONS = "images.parquet", "keys.parquet", "predictions.parquet"


@dataclass(frozen=True)
class ServedPredictions:
    """What a registered model predicts for N images."""

    probabilities: NDArray[np.float64]
    """(N, classes), by class id."""
    weights: str
    """sha256 of its weights as the registry gave it."""
    size: int
    """Of the same file, in bytes."""
    classes: list[str]
    milliseconds: list[float]
    """Of each single prediction that was timed."""


@contextmanager
def fresh_process(threads: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A process that will load one model, on the CPU. It imports what that takes while the caller is still at work."""
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": tracking_uri(),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "CUDA_VISIBLE_DEVICES": "",  # what is timed is one thread of a CPU, the same everywhere
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "stages.registry.model_process"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def predict(process: subprocess.Popen[str], source: str, images: Sequence[bytes], timed: int = 0) -> ServedPredictions:
    """What the model predicts for encoded images.

    Args:
        process: a `fresh_process`, which ends with this.
        source: the model's address in MLflow, `models:/...`.
        timed: how many single predictions are timed.

    Raises:
        StageError: the model does not load, or does not predict.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pd.DataFrame({"image": list(images)}).to_parquet(folder / IMAGES)
        _request(process, source, folder, timed=timed)
        table = pd.read_parquet(folder / PREDICTIONS)
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return ServedPredictions(np.stack(table["probabilities"].to_list()), **facts)


def predict_shards(source: str, keys: Iterable[str], shards: Iterable[Path]) -> tuple[pd.DataFrame, list[str]]:
    """What the model predicts for labelled images of shard sets of role finetune.

    Shard sets with smaller images than the model was trained on are left out.

    Returns:
        key and logits, a row for each of `keys` that the splits test and fresh hold; and the model's classes, empty
        where there is no row.

    Raises:
        StageError: the model does not load, or does not predict.
    """
    with fresh_process(worker_count()) as process, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pd.DataFrame({"key": list(keys)}).to_parquet(folder / KEYS)
        write_json(folder / SHARDS, [str(each) for each in shards])
        _request(process, source, folder)
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return pd.read_parquet(folder / PREDICTIONS, columns=["key", "logits"]), facts["classes"]


def _request(process: subprocess.Popen[str], source: str, folder: Path, timed: int = 0) -> None:
    process.communicate(json.dumps({"source": source, "folder": str(folder), "timed": timed}))
    if process.returncode:
        error = folder / ERROR
        why = error.read_text(encoding="utf-8") if error.exists() else f"its process ended with {process.returncode}"
        raise StageError(f"the model {source} does not load and answer:\n{textwrap.indent(why[-2000:], '  ')}")


# ------------------------------------------------------------------------------------------------ in the process itself


def main() -> None:
    """Answers one request; after a failure, the folder holds the traceback."""
    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    try:
        _predict(request["source"], folder, request["timed"])
    except Exception:
        (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)


def _predict(source: str, folder: Path, timed: int) -> None:
    open_client()
    local = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder / "model")))
    model = mlflow.pyfunc.load_model(str(local))
    (weights,) = local.rglob(layout.WEIGHTS)
    facts: dict[str, Any] = {
        "weights": sha256(weights),
        "size": weights.stat().st_size,
        "classes": [],
        "milliseconds": [],
    }
    if (folder / IMAGES).exists():
        images = pd.read_parquet(folder / IMAGES)
        probabilities, facts["classes"] = by_class(model.predict(images, params={"top_k": ALL_CLASSES}))
        pd.DataFrame({"probabilities": list(probabilities)}).to_parquet(folder / PREDICTIONS)
        facts["milliseconds"] = _milliseconds(model, images, timed)
    else:
        trained_on = json.loads(weights.with_name(layout.CONFIG).read_text(encoding="utf-8"))["resize"]
        shards = _large_enough(json.loads((folder / SHARDS).read_text(encoding="utf-8")), trained_on)
        facts["classes"] = _predict_shards(model, set(pd.read_parquet(folder / KEYS)["key"]), shards, folder)
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def by_class(best: pd.DataFrame) -> tuple[NDArray[np.float64], list[str]]:
    """The served model's output for all classes, best first, as probabilities (N, classes) by class id; the classes."""
    table = np.zeros((len(best), max(map(len, best["class_id"]), default=0)))
    names = [""] * table.shape[1]
    for row, (ids, labels, values) in enumerate(best[["class_id", "name", "probability"]].to_numpy()):
        table[row, ids] = values
        for index, label in zip(ids, labels, strict=True):
            names[index] = label
    return table, names


def _milliseconds(model: Any, images: pd.DataFrame, timed: int) -> list[float]:
    milliseconds = []
    for i in range(timed + 3 if timed else 0):  # the first ones warm up
        began = time.perf_counter()
        model.predict(images.iloc[[i % len(images)]])
        milliseconds.append(1000 * (time.perf_counter() - began))
    return milliseconds[3:]


def _large_enough(folders: Iterable[str], resize: int) -> list[Path]:
    """Shard sets with images at least as large as the model was trained on: enlarged ones would be harder."""
    kept = []
    for shard_set in map(Path, folders):
        if (written := read_index(shard_set)["resize"]) >= resize:
            kept.append(shard_set)
        else:
            what = "warning: %s is left out: its images have %d px, the model was trained with %d"
            logger.warning(what, shard_set, written, resize)
    return kept


def _predict_shards(model: Any, keys: set[str], shards: Sequence[Path], folder: Path) -> list[str]:
    """Writes `PREDICTIONS` a batch at a time; returns the model's classes."""
    classes: list[str] = []
    schema = pa.schema([("key", pa.string()), ("logits", pa.list_(pa.float32()))])
    splits = [read_samples(shards, split).labelled() for split in ("test", "fresh")]
    wanted = [(samples, i) for samples in splits for i, key in enumerate(samples.key) if key in keys]
    batches = [wanted[start : start + BATCH] for start in range(0, len(wanted), BATCH)]
    with pq.ParquetWriter(folder / PREDICTIONS, schema) as writer:
        for batch in progress(batches, len(batches), "asked again, batches"):
            images = pd.DataFrame({"image": [samples.jpeg(i) for samples, i in batch]})
            probabilities, classes = by_class(model.predict(images, params={"top_k": ALL_CLASSES}))
            logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)).astype(np.float32)
            rows = {"key": [samples.key[i] for samples, i in batch], "logits": list(logits)}
            writer.write_table(pa.Table.from_pydict(rows, schema=schema))
    return classes


if __name__ == "__main__":
    import torchvision  # noqa: F401  the model imports it; here, while the caller is still logging the model

    run(main)
