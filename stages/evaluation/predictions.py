"""Predictions: what models make of the images of a split, and reports/predictions.parquet, which keeps them.

`Predictions` holds several models on one split, in memory; `VersionPredictions` one registered version, read back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.samples.shard_sets import shard_sets
from stages.evaluation.metrics import Bools, Floats, ImageScores, Int64, image_scores, predicted_classes
from stages.runtime.command import StageError
from stages.runtime.tables import write_table

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("batch", pa.string()),
        ("split", pa.string()),  # test or fresh
        ("label", pa.int32()),
        ("logits", pa.list_(pa.float32())),  # of the fine-tuned model
    ]
)
"""Of reports/predictions.parquet: a row per labelled image of test, then of fresh, in the order of the shards."""


@dataclass(frozen=True)
class Predictions:
    """Logits (N, C) float32 of each model on the images of one split, in their order; None: there is no such model."""

    samples: Samples
    finetuned: Floats
    before: Floats | None = None
    """Of the frozen backbone with the nearest class mean as its head."""
    scratch: Floats | None = None

    @property
    def labels(self) -> Int64:
        """(N,) true classes."""
        return self.samples.label

    @cached_property
    def scores(self) -> ImageScores:
        """Of the fine-tuned model."""
        return image_scores(self.finetuned, self.labels)


def write_predictions(test: Predictions, fresh: Predictions, path: Path) -> None:
    """Writes the fine-tuned model's logits as `SCHEMA` describes."""
    frames = [
        pd.DataFrame(
            {
                "key": split.samples.key,
                "batch": [split.samples.batch_names[i] for i in split.samples.batch],
                "split": name,
                "label": split.labels.astype(np.int32),
                "logits": list(split.finetuned),
            }
        )
        for name, split in (("test", test), ("fresh", fresh))
        if len(split.samples)
    ]
    write_table(pd.concat(frames, ignore_index=True), SCHEMA, path)


def read_predictions(path: Path) -> pd.DataFrame:
    """The columns of `SCHEMA`, a row per image.

    Raises:
        OSError, ValueError: the file is missing, damaged, or lacks a column.
    """
    return pd.read_parquet(path, columns=SCHEMA.names)


def check_complete(splits: Mapping[str, Samples], accepted: Path) -> None:
    """Compares the images to be scored with the accepted ones: each labelled one exactly once, under its label.

    Args:
        accepted: folder of accepted/<role>/<batch>.parquet.

    Raises:
        StageError: naming the first image that is missing, there twice, not accepted, or labelled otherwise.
    """
    columns = ["key", "split", "label"]
    files = sorted(accepted.glob("*.parquet"))
    rows = pd.concat([pd.read_parquet(path, columns=columns) for path in files] or [pd.DataFrame(columns=columns)])
    for split, samples in splits.items():
        of_split = rows[(rows["split"] == split) & (rows["label"] >= 0)]
        expected = dict(zip(of_split["key"], of_split["label"], strict=True))
        scored = dict(zip(samples.key, samples.label.tolist(), strict=True))
        advice = "The shards are not those of data/accepted; `dvc repro` makes them anew"
        if len(scored) < len(samples):
            keys = pd.Series(samples.key)
            raise StageError(f"data/shards/finetune holds {keys[keys.duplicated()].iloc[0]} twice in {split}. {advice}")
        if missing := sorted(expected.keys() - scored.keys()):
            raise StageError(
                f"{len(missing)} accepted images of {split} are not in the shards, the first is {missing[0]}. {advice}"
            )
        if extra := sorted(scored.keys() - expected.keys()):
            raise StageError(f"{len(extra)} images of {split} were not accepted, the first is {extra[0]}. {advice}")
        if other := sorted(key for key, label in scored.items() if label != expected[key]):
            raise StageError(f"{len(other)} images of {split} have another label, the first is {other[0]}. {advice}")


def read_test_samples() -> Samples:
    """The images of the split `test` in data/shards/finetune; empty where it holds none.

    Raises:
        StageError: a shard is missing or damaged.
    """
    return read_samples(shard_sets("finetune"), "test")


def evenly_spaced(count: int, most: int) -> Int64:
    """At most `most` indexes within 0..count-1, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


# ------------------------------------------------------------------------------------------------ of one version


@dataclass(frozen=True)
class VersionPredictions:
    """The classes that one version predicts for the labelled images of `test` and `fresh`, sorted by key; (N,) each."""

    sha256: str
    """Of the version's weights."""
    keys: tuple[str, ...]
    split: NDArray[np.str_]
    batch: NDArray[np.str_]
    labels: Int64
    predicted: Int64
    classes: int | None = None
    """Number of classes that the version knows, if known; it can never predict a label at or above it."""

    @property
    def correct(self) -> Bools:
        """Whether each prediction is right."""
        return self.predicted == self.labels

    @property
    def test(self) -> Bools:
        """Which images are of the split `test`."""
        return self.split == "test"


def version_predictions(sha256: str, rows: pd.DataFrame) -> VersionPredictions:
    """A version's predictions, from the rows of its reports/predictions.parquet.

    Raises:
        ValueError: no labelled row of the split `test`, or a key twice.
        KeyError: a column is missing.
    """
    rows = rows[(rows["label"] >= 0) & rows["split"].isin(["test", "fresh"])].sort_values("key")
    if not (rows["split"] == "test").any():
        raise ValueError("the predictions hold no image of the split `test`")
    if rows["key"].duplicated().any():
        raise ValueError(f"the predictions hold {rows['key'][rows['key'].duplicated()].iloc[0]} twice")
    logits = np.stack(rows["logits"].to_list())
    return VersionPredictions(
        sha256=sha256,
        keys=tuple(rows["key"]),
        split=rows["split"].to_numpy(np.str_),
        batch=rows["batch"].to_numpy(np.str_),
        labels=rows["label"].to_numpy(np.int64),
        predicted=predicted_classes(logits),
        classes=logits.shape[1],
    )


def no_predictions(sha256: str) -> VersionPredictions:
    """Of a version that can no longer predict: nothing can pass the gate against it."""
    names, numbers = np.empty(0, "U1"), np.empty(0, np.int64)
    return VersionPredictions(sha256, (), names, names, numbers, numbers)
