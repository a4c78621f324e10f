"""Which images of a delivery to label first: those that models/finetuned is unsure of, and no two of them alike.

All images without a label in the shards of BATCH are asked, whatever their split. Writes queue.csv, a row an image in
the order in which to label them, and queue.html, a contact sheet that needs nothing but a browser.
"""

import argparse
import csv
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.params.evaluate import Evaluate
from stages.params.training.training import Training
from stages.runtime.command import StageError, positive, run
from stages.runtime.files import replaced_file, write_text
from stages.runtime.params_file import load_section
from stages.runtime.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from stages.data.shards.loading.samples.index import Samples
    from stages.evaluation.active_learning import Candidates
    from stages.training.networks.devices import Compute

logger = logging.getLogger(__name__)

MODEL = Path("models/finetuned")
OUT = Path("reports/label_queue")
ROLES = ("pretrain", "finetune")
COLUMNS = (
    "rank", "key", "batch", "split", "uncertainty", "class", "probability", "second_class", "second_probability",
)  # fmt: skip
DIGITS = 6


@dataclass(frozen=True)
class Pool:
    """The unlabelled images of a batch, a split after the other."""

    batch: str
    splits: dict[str, "Samples"]
    resize: int
    """Which their shards were written with."""

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def find(self, place: int) -> tuple[str, "Samples", int]:
        """The split, its samples, and where in them the image is."""
        for split, samples in self.splits.items():
            if place < len(samples):
                return split, samples, place
            place -= len(samples)
        raise IndexError(place)


def queue(pool: Pool, count: int, seed: int, training: Training, batch_size: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of queue.csv, the first to be labelled first, and how many candidates they were drawn from.

    Raises:
        StageError: there is no model, or it cannot tell how sure it is.
    """
    from stages.evaluation.active_learning import CANDIDATES, diverse, most_unsure
    from stages.training.networks.devices import set_up
    from stages.training.networks.models import load_classifier

    compute = set_up(training)
    model, config = load_classifier(MODEL, compute.device)
    if len(config["classes"]) < 2:
        raise StageError(f"{MODEL} has one class, so it is never unsure; a queue needs a model of two or more")
    if pool.resize < config["resize"]:
        logger.warning(
            "warning: the images of %s have %d px, the model was trained with %d: it sees them enlarged, and is less "
            "sure for that", pool.batch, pool.resize, config["resize"],
        )  # fmt: skip
    compute.place(model)
    candidates = most_unsure(model, _images(pool, config, batch_size, compute), CANDIDATES * count, compute)
    drawn = candidates.at(diverse(candidates.features, candidates.uncertainty, count, seed))
    return _rows(pool, drawn, config["classes"]), len(candidates)


def unlabelled(batch: str) -> Pool:
    """The images of a batch that have no label.

    Raises:
        StageError: there is no such batch, or all its images have one.
    """
    import numpy as np

    from stages.data.shards.loading.samples.index import read_samples
    from stages.data.shards.loading.samples.shard_sets import read_index, shard_sets

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


def _images(pool: Pool, config: dict[str, Any], batch_size: int, compute: "Compute") -> Iterator["Tensor"]:
    from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches

    batches = (
        images
        for samples in pool.splits.values()
        for images, _ in evaluation_batches(
            samples, image_size=config["image_size"], resize=config["resize"], batch_size=batch_size,
            threads=compute.threads, device=compute.device,
        )
    )  # fmt: skip
    total = sum(-(-len(samples) // batch_size) for samples in pool.splits.values())
    return progress(batches, total, "unlabelled images asked, batches")


def _rows(pool: Pool, drawn: "Candidates", classes: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for i, place in enumerate(drawn.place.tolist()):
        split, samples, index = pool.find(place)
        best, second = drawn.probabilities[i].tolist()
        first_class, second_class = (classes[each] for each in drawn.classes[i])
        values = (i + 1, samples.key[index], pool.batch, split, round(float(drawn.uncertainty[i]), DIGITS),
                  first_class, round(best, DIGITS), second_class, round(second, DIGITS))  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


# ----------------------------------------------------------------------------------------------------- contact sheet


def sheet(pool: Pool, rows: Sequence[dict[str, Any]], candidates: int) -> str:
    """One self-contained HTML page with a thumbnail for each row."""
    from stages.evaluation.contact_sheet import contact_sheet

    drawn = {row["key"] for row in rows}
    jpegs = {key: s.jpeg(i) for s in pool.splits.values() for i, key in enumerate(s.key) if key in drawn}
    return contact_sheet(pool.batch, len(pool), candidates, rows, jpegs)


# ---------------------------------------------------------------------------------------------------------- command


def main() -> None:
    """Asks the model, and writes both files."""
    arguments = _arguments()
    out: Path = arguments.out or OUT / arguments.batch
    _check_folder(out)
    pool = unlabelled(arguments.batch)
    batch_size = load_section("evaluate", Evaluate).batch_size
    training = load_section("training", Training)
    rows, candidates = queue(pool, arguments.count, arguments.seed, training, batch_size)
    page = sheet(pool, rows, candidates)
    with replaced_file(out / "queue.csv") as aside, aside.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, COLUMNS)
        lines.writeheader()
        lines.writerows(rows)
    write_text(out / "queue.html", page)
    if len(rows) < min(arguments.count, len(pool)):
        logger.info("%d images were asked for; the others repeat these, or the model is sure of them", arguments.count)
    print(f"{out / 'queue.csv'}, {out / 'queue.html'}: {len(rows):,} of {len(pool):,} unlabelled images")


def _check_folder(out: Path) -> None:
    there = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise StageError(f"--out {out}: {there} is no folder that may be written to")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", metavar="BATCH", help="a batch of params.yaml, of either role")
    parser.add_argument("--count", type=positive, default=100, help="images asked for (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {OUT}/BATCH, which git ignores")
    parser.add_argument("--seed", type=positive, default=1, help="of the draw among the candidates (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
