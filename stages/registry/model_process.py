"""Asking a model of the registry, always in a process of its own: two versions that are loaded in one process would
both answer with the code of the first. The process is this module: `python -m stages.registry.model_process` reads one
question as JSON from stdin, and puts what the model said into the folder that the question names.
"""

import json
import logging
import os
import re
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
from typing import TYPE_CHECKING, Any

from stages.registry import versions
from stages.registry.client import open_client, reachable, tracking_uri
from stages.registry.tags import MODEL_SHA256
from stages.registry.versions import Version
from stages.runtime.command import StageError, run
from stages.runtime.files import sha256, write_json
from stages.runtime.progress import progress, worker_count

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

ALL_CLASSES = 1_000_000
"""As `top_k`."""
BATCH = 64
ERROR = "error.txt"
SHARDS = "shards.json"


@dataclass(frozen=True)
class Said:
    """What a registered model said to N images."""

    probabilities: "NDArray[np.float64]"
    """(N, classes), by class id."""
    weights: str
    """sha256 of its model.safetensors as the registry gave it."""
    size: int
    """Bytes of the same."""
    classes: list[str]
    milliseconds: list[float]
    """Of the single predictions that were timed."""


ADDRESS = re.compile(r"models:/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<alias>[\w-]+)|/(?P<number>\d+))")


def find(address: str) -> Version:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` is the address of.

    Raises:
        StageError: it is no such address, there is no such version, or MLflow failed.
    """
    parts = ADDRESS.fullmatch(address)
    if not parts:
        raise StageError(f"{address!r} is no registered model; expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts["name"], parts["alias"], parts["number"]
    known = _versions(name)
    found = [each for each in known if alias in each.aliases or str(each.number) == number]
    if not found:
        what = f"version {number}" if number else f"version with the alias {alias}"
        listed = ", ".join(" ".join([str(each.number), *(f"@{one}" for one in each.aliases)]) for each in known[:10])
        more = ", ..." if len(known) > 10 else ""
        raise StageError(f"{name} has no {what}; it has {listed}{more}. One of them: models:/{name}/{known[0].number}")
    return found[0]


def newest(name: str) -> Version:
    """The newest version of a model whose registration was finished.

    Raises:
        StageError: there is none, or MLflow failed.
    """
    if found := [each for each in _versions(name) if each.sha256]:
        return found[0]
    raise StageError(f"no version of {name} was registered to the end (tag {MODEL_SHA256}); `make repro` does it")


def _versions(name: str) -> list[Version]:
    database = Path(tracking_uri().removeprefix("sqlite:///"))
    if tracking_uri().startswith("sqlite:///") and not database.exists():
        raise StageError(f"there is no registry: {database} is missing. `make repro` makes it, in the repository root")
    with reachable():
        found = versions.list_versions(name)
    if not found:
        raise StageError(f"MLflow at {tracking_uri()} has no version of a model called {name}")
    return found


@contextmanager
def fresh_process(threads: int = 1) -> Iterator["subprocess.Popen[str]"]:
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


def ask(process: "subprocess.Popen[str]", source: str, images: Sequence[bytes], timed: int = 0) -> Said:
    """What the model says to encoded images.

    Args:
        source: its address in MLflow, `models:/...`.
        timed: how many single predictions are timed.

    Raises:
        StageError: it does not load, or does not answer.
    """
    import numpy as np
    import pandas as pd

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pd.DataFrame({"image": list(images)}).to_parquet(folder / "images.parquet")
        _question(process, source, folder, timed=timed)
        answers = pd.read_parquet(folder / "answers.parquet")
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return Said(np.stack(answers["probabilities"].to_list()), **facts)


def score(source: str, keys: Iterable[str], shards: Iterable[Path]) -> "tuple[pd.DataFrame, list[str]]":
    """What the model says to labelled images of shard sets of role finetune.

    Returns:
        a row for each of `keys` that the splits test and fresh hold, in images as large as those that it was trained
        on: key, logits; and its classes, none where it was asked nothing.

    Raises:
        StageError: it does not load, or does not answer.
    """
    import pandas as pd

    with fresh_process(worker_count()) as process, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pd.DataFrame({"key": list(keys)}).to_parquet(folder / "keys.parquet")
        write_json(folder / SHARDS, [str(each) for each in shards])
        _question(process, source, folder)
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        return pd.read_parquet(folder / "answers.parquet", columns=["key", "logits"]), facts["classes"]


def _question(process: "subprocess.Popen[str]", source: str, folder: Path, timed: int = 0) -> None:
    process.communicate(json.dumps({"source": source, "folder": str(folder), "timed": timed}))
    if process.returncode:
        error = folder / ERROR
        said = error.read_text(encoding="utf-8") if error.exists() else f"its process ended with {process.returncode}"
        raise StageError(f"the model {source} does not load and answer:\n{textwrap.indent(said[-2000:], '  ')}")


# ------------------------------------------------------------------------------------------------ in the process itself


def main() -> None:
    """Answers one question; of a failure the folder holds what happened."""
    question = json.load(sys.stdin)
    folder = Path(question["folder"])
    try:
        _answer(question["source"], folder, question["timed"])
    except Exception:
        (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)


def _answer(source: str, folder: Path, timed: int) -> None:
    open_client()
    import mlflow
    import pandas as pd
    import torchvision  # noqa: F401  what the model will import, while the caller is still logging it

    local = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder / "model")))
    model = mlflow.pyfunc.load_model(str(local))
    (weights,) = local.rglob("model.safetensors")
    facts: dict[str, Any] = {
        "weights": sha256(weights),
        "size": weights.stat().st_size,
        "classes": [],
        "milliseconds": [],
    }
    if (folder / "images.parquet").exists():
        images = pd.read_parquet(folder / "images.parquet")
        probabilities, facts["classes"] = by_class(model.predict(images, params={"top_k": ALL_CLASSES}))
        pd.DataFrame({"probabilities": list(probabilities)}).to_parquet(folder / "answers.parquet")
        facts["milliseconds"] = _milliseconds(model, images, timed)
    else:
        trained_on = json.loads(weights.with_name("config.json").read_text(encoding="utf-8"))["resize"]
        shards = _large_enough(json.loads((folder / SHARDS).read_text(encoding="utf-8")), trained_on)
        facts["classes"] = _score_shards(model, set(pd.read_parquet(folder / "keys.parquet")["key"]), shards, folder)
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def by_class(answers: "pd.DataFrame") -> "tuple[NDArray[np.float64], list[str]]":
    """Answers of all classes as the served model gives them, best first, as (N, classes) probabilities; the classes."""
    import numpy as np

    table = np.zeros((len(answers), max(map(len, answers["class_id"]), default=0)))
    names = [""] * table.shape[1]
    for row, (ids, labels, values) in enumerate(answers[["class_id", "name", "probability"]].to_numpy()):
        table[row, ids] = values
        for index, label in zip(ids, labels, strict=True):
            names[index] = label
    return table, names


def _milliseconds(model: Any, images: "pd.DataFrame", timed: int) -> list[float]:
    milliseconds = []
    for i in range(timed + 3 if timed else 0):  # the first ones warm up
        began = time.perf_counter()
        model.predict(images.iloc[[i % len(images)]])
        milliseconds.append(1000 * (time.perf_counter() - began))
    return milliseconds[3:]


def _large_enough(folders: Iterable[str], resize: int) -> list[Path]:
    """Shard sets written at least as large as the model is used to: it would see others enlarged, and lose by that."""
    from stages.data.shards.loading.samples.shard_sets import read_index

    kept = []
    for shard_set in map(Path, folders):
        if (written := read_index(shard_set)["resize"]) >= resize:
            kept.append(shard_set)
        else:
            logger.warning(
                "warning: %s is left out: its images have %d px, the model was trained with %d",
                shard_set, written, resize,
            )  # fmt: skip
    return kept


def _score_shards(model: Any, keys: set[str], shards: Sequence[Path], folder: Path) -> list[str]:
    """Writes answers.parquet a batch at a time; returns the model's classes."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.data.shards.loading.samples.index import read_samples

    classes: list[str] = []
    schema = pa.schema([("key", pa.string()), ("logits", pa.list_(pa.float32()))])
    splits = [read_samples(shards, split).labelled() for split in ("test", "fresh")]
    wanted = [(samples, i) for samples in splits for i, key in enumerate(samples.key) if key in keys]
    batches = [wanted[start : start + BATCH] for start in range(0, len(wanted), BATCH)]
    with pq.ParquetWriter(folder / "answers.parquet", schema) as writer:
        for batch in progress(batches, len(batches), "asked again, batches"):
            images = pd.DataFrame({"image": [samples.jpeg(i) for samples, i in batch]})
            probabilities, classes = by_class(model.predict(images, params={"top_k": ALL_CLASSES}))
            logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)).astype(np.float32)
            rows = {"key": [samples.key[i] for samples, i in batch], "logits": list(logits)}
            writer.write_table(pa.Table.from_pydict(rows, schema=schema))
    return classes


if __name__ == "__main__":
    run(main)
