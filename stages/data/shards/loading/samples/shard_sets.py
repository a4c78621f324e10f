"""Shard sets as their readers see them: the shards of a batch, and `index.json`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stages.runtime import layout
from stages.runtime.command import StageError


def shard_sets(role: str) -> list[Path]:
    """The shard sets of a role, sorted by name. Those of batches no longer listed have been removed by validate."""
    return sorted(path.parent for path in (layout.SHARDS / role).glob("[!.]*/index.json"))  # dot: half-made


def read_index(shard_set: Path) -> dict[str, Any]:
    """`index.json` of a shard set.

    Raises:
        StageError: there is none.
    """
    path = shard_set / "index.json"
    if not path.is_file():
        raise StageError(f"{shard_set} is not a shard set (no index.json); `dvc repro shard@{shard_set.name}` makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def check_resize(sets: list[Path], image_size: int) -> None:
    """Compares the size that shards were written in with the size that a model takes.

    Raises:
        StageError: the crop of the model is larger than the images.
    """
    for shard_set in sets:
        if (resize := read_index(shard_set)["resize"]) < image_size:
            raise StageError(
                f"`model.image_size` is {image_size}, but {shard_set} was written with `shard.{shard_set.parent.name}."
                f"resize` {resize}; make that at least as large"
            )


def pooled_statistics(indexes: list[dict[str, Any]]) -> dict[str, list[float]] | None:
    """Mean and standard deviation of R, G and B over several shard sets, weighted by training images.

    None where there are no training images.
    """
    trained = [index for index in indexes if index["mean"]]
    if not trained:
        return None
    counts = [index["splits"]["train"]["count"] for index in trained]
    means, stds = np.array([index["mean"] for index in trained]), np.array([index["std"] for index in trained])
    mean = np.average(means, axis=0, weights=counts)
    std = np.sqrt(np.average(stds**2 + means**2, axis=0, weights=counts) - mean**2)
    return {"mean": mean.round(6).tolist(), "std": std.round(6).tolist()}
