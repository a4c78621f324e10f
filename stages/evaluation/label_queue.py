"""Which images of a delivery to label first: those that models/finetuned is unsure of, and no two of them alike."""

import csv
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.samples.shard_sets import read_index, shard_sets
from stages.evaluation.active_learning import CANDIDATES, Candidates, diverse, most_unsure
from stages.evaluation.contact_sheet import contact_sheet
from stages.params.training.training import Training
from stages.runtime.command import StageError
from stages.runtime.files import check_folder, replaced_file, write_text
from stages.runtime.layout import FINETUNED
from stages.runtime.progress import progress
from stages.training.networks.devices import Compute, set_up
from stages.training.networks.models import load_classifier

logger = logging.getLogger(__name__)

ROLES = ("pretrain", "finetune")
COLUMNS = (
    *("rank", "key", "batch", "split", "uncertainty", "class", "probability"),
    *("second_class", "second_probability"),
)
DIGITS = 6


@dataclass(frozen=True)
class Pool:
    """The unlabelled images of a batch, a split after the other."""

    batch: str
    splits: dict[str, Samples]
    resize: int
    """Shorter side of the images in the shards, in pixels."""

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def find(self, place: int) -> tuple[str, Samples, int]:
        """The split, its samples, and the index of the image in them."""
        for split, samples in self.splits.items():
            if place < len(samples):
                return split, samples, place
            place -= len(samples)
        raise IndexError(place)


def write_queue(batch: str, count: int, seed: int, out: Path, training: Training, batch_size: int) -> None:
    """Writes queue.csv and queue.html of a batch into `out`, and prints what they hold.

    Args:
        count: images in the queue; fewer where the others repeat these, or the model is sure of them.
        seed: of the draw among the candidates.
        batch_size: images that the model sees at once.

    Raises:
        StageError: `out` cannot be written, the batch has no unlabelled image, or there is no model of two classes.
    """
    check_folder(out, "--out")
    pool = unlabelled(batch)
    rows, candidates = queue(pool, count, seed, training, batch_size)
    drawn = {row["key"] for row in rows}
    jpegs = {key: s.jpeg(i) for s in pool.splits.values() for i, key in enumerate(s.key) if key in drawn}
    page = contact_sheet(batch, len(pool), candidates, rows, jpegs)
    with replaced_file(out / "queue.csv") as aside, aside.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, COLUMNS)
        lines.writeheader()
        lines.writerows(rows)
    write_text(out / "queue.html", page)
    if len(rows) < min(count, len(pool)):
        logger.info("%d images were asked for; the others repeat these, or the model is sure of them", count)
    print(f"{out / 'queue.csv'}, {out / 'queue.html'}: {len(rows):,} of {len(pool):,} unlabelled images")


def queue(pool: Pool, count: int, seed: int, training: Training, batch_size: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of queue.csv, the first to be labelled first, and how many candidates they were drawn from.

    Raises:
        StageError: there is no model, or it cannot tell how sure it is.
    """
    compute = set_up(training)
    model, config = load_classifier(FINETUNED, compute.device)
    if len(config["classes"]) < 2:
        raise StageError(f"{FINETUNED} has one class, so it is never unsure; a queue needs a model of two or more")
    if pool.resize < config["resize"]:
        logger.warning(
            "warning: the images of %s have %d px, the model was trained with %d: it sees them enlarged, and is less "
            "sure for that",
            *(pool.batch, pool.resize, config["resize"]),
        )
    compute.place(model)
    candidates = most_unsure(model, _images(pool, config, batch_size, compute), CANDIDATES * count, compute)
    drawn = candidates.at(diverse(candidates.features, candidates.uncertainty, count, seed))
    return _rows(pool, drawn, config["classes"]), len(candidates)


def unlabelled(batch: str) -> Pool:
    """The images of a batch that have no label.

    Raises:
        StageError: there is no such batch, or all its images have one.
    """
    sets = [each for role in ROLES for each in shard_sets(role)]
    found = [each for each in sets if each.name == batch]
    if not found:
        known = ", ".join(each.name for each in sets) or "none"
        raise StageError(
            f"there are no shards of a batch {batch!r} in data/shards (found: {known}); list it in params.yaml, and "
            f"`dvc repro shard` makes them"
        )
    (folder,) = found
    index = read_index(folder)
    all_of_it = {split: read_samples([folder], split) for split in index["splits"]}
    without = {split: samples.at(np.flatnonzero(samples.label < 0)) for split, samples in all_of_it.items()}
    pool = Pool(batch, without, index["resize"])
    if not len(pool):
        images = sum(map(len, all_of_it.values()))
        raise StageError(f"all {images:,} images of {batch} have a label, so there is nothing to queue")
    return pool


def _images(pool: Pool, config: dict[str, Any], batch_size: int, compute: Compute) -> Iterator[Tensor]:
    how = {"image_size": config["image_size"], "resize": config["resize"], "batch_size": batch_size}
    how |= {"threads": compute.threads, "device": compute.device}
    batches = (images for samples in pool.splits.values() for images, _ in evaluation_batches(samples, **how))
    total = sum(-(-len(samples) // batch_size) for samples in pool.splits.values())
    return progress(batches, total, "unlabelled images asked, batches")


def _rows(pool: Pool, drawn: Candidates, classes: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for i, place in enumerate(drawn.place.tolist()):
        split, samples, index = pool.find(place)
        best, second = drawn.probabilities[i].tolist()
        first_class, second_class = (classes[each] for each in drawn.classes[i])
        identity = (i + 1, samples.key[index], pool.batch, split)
        figures = (float(drawn.uncertainty[i]), first_class, best, second_class, second)
        rounded = (round(each, DIGITS) if isinstance(each, float) else each for each in figures)
        rows.append(dict(zip(COLUMNS, (*identity, *rounded), strict=True)))
    return rows
