"""Validation of all batches at once: reads the facts, judges, and writes what follows."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from stages.data.raw.facts import ACCEPTED, QUARANTINE
from stages.data.validation.judging import ValidationResult, judge
from stages.data.validation.page import render
from stages.data.validation.pixel_match import maker, pixel_confirmation
from stages.data.validation.splits import assign_splits, known_sides
from stages.data.validation.summary import as_json, summary
from stages.params.batches import ROLES, Batch
from stages.params.split import Split
from stages.params.validate import Validate
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import write_text
from stages.runtime.fingerprint import prune, work_folder
from stages.runtime.tables import read_table, write_table

logger = logging.getLogger(__name__)


def validate(batches: dict[str, Batch], split: Split, limits: Validate) -> None:
    """Judges all batches and writes what follows; where they are not fit for training, writes only the reasons.

    Raises:
        StageError: they are not fit; a batch has not been scanned; a raw tar is missing or damaged.
    """
    sweep(batches)
    images = read_facts(batches)
    assign(images, batches, split)
    accounts = {name: read_account(batch.role, name) for name, batch in batches.items()}
    old = [name for name, account in accounts.items() if account is None]
    result = judge(images, batches, limits, partial(pixel_confirmation, cache=thumbnail_cache()), old)
    report = summary(result, batches, limits, accounts)
    html = render(report, result.images, layout.RAW, result.noted, result.collapsed)
    folder = layout.VALIDATION_FAILED if result.stops else layout.REPORTS
    write_text(folder / layout.VALIDATION.name, as_json(report))
    page = folder / layout.VALIDATION_PAGE.name
    write_text(page, html)
    if result.stops:
        reasons = "".join(f"\n  - {stop}" for stop in result.stops)
        raise StageError(f"not fit for training, so nothing was written:{reasons}\n  the whole picture: {page}")
    write_outputs(result, batches)
    for name, counts in report["batches"].items():
        logger.info("validate %s: %d accepted, %d quarantined", name, counts["accepted"], counts["quarantined"])
        if counts["bound"]:
            placed = ", ".join(f"{number:,} in {split}" for split, number in counts["bound"].items())
            logger.info("validate %s: images whose group earlier batches have: %s", name, placed)


def thumbnail_cache() -> Path:
    """The file of thumbnails for the next run; those of other code are removed."""
    folder = work_folder("validate", maker())
    prune(folder.parent, keep=folder)
    return folder / "thumbnails.npz"


def sweep(batches: dict[str, Batch]) -> None:
    """Removes the data of batches that params.yaml no longer lists: DVC leaves it, and the next training would read it.

    Their unfinished work goes too: that of a killed ingest may be as large as the source.
    """
    for path in sorted(layout.WORK.glob("*@*")):
        if path.name.partition("@")[2] not in batches:
            logger.info("validate: removing %s (params.yaml lists no such batch)", path)
            shutil.rmtree(path)
    for folder in (layout.RAW, layout.FACTS, layout.SHARDS, layout.ACCEPTED):
        for role in ROLES:
            # A stage that was killed leaves `.<batch>.tmp`; .gitkeep stays.
            for path in sorted({*(folder / role).glob("[!.]*"), *(folder / role).glob(".*.tmp")}):
                name = path.name.removesuffix(".parquet")
                if name in batches and batches[name].role == role:
                    continue
                logger.info("validate: removing %s (params.yaml lists no such %s batch)", path, role)
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def read_facts(batches: dict[str, Batch]) -> pd.DataFrame:
    """The facts of all batches in order of arrival, with the columns `role` and `arrival` (number of the batch).

    Raises:
        StageError: a batch has not been scanned.
    """
    tables = []
    for arrival, (name, batch) in enumerate(batches.items()):
        path = layout.facts(batch.role, name)
        if not path.exists():
            raise StageError(f"{path} is missing; `dvc repro scan@{name}` makes it, `dvc pull` brings it")
        tables.append(read_table(path).assign(role=batch.role, arrival=arrival))
    return pd.concat(tables, ignore_index=True)


def read_account(role: str, batch: str) -> dict[str, Any] | None:
    """What ingest understood of a batch's source; None where an older version of it did not record that.

    Titles of classes are left out: there may be as many as classes.
    """
    path = layout.raw(role, batch) / layout.ACCOUNT
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key != "titles"}


def assign(images: pd.DataFrame, batches: dict[str, Batch], limits: Split) -> None:
    """Adds the columns `split` and `bound` (the side that an image's group has in earlier batches, or empty).

    Batch by batch: what comes later changes nothing.
    """
    first_finetune = next((name for name, batch in batches.items() if batch.role == "finetune"), None)
    copy = images.sort_values("arrival", kind="stable")["sha256"].duplicated()
    images["counts"] = images["decodes"].astype(bool) & ~copy
    images["split"] = images["bound"] = ""
    sides = pd.Series(dtype=object)
    for arrival, (name, batch) in enumerate(batches.items()):
        rows = images.loc[images["arrival"] == arrival, ["source_split", "class_name", "sha256", "group", "counts"]]
        later = batch.role == "finetune" and name != first_finetune
        split = pd.Series(assign_splits(rows, batch.role, later, limits, sides), rows.index)
        images.loc[rows.index, "split"] = split
        images.loc[rows.index, "bound"] = rows["group"].map(sides).astype(object).fillna("")
        if (grouped := rows["group"] != "").any():
            sides = known_sides([*sides.index, *rows["group"][grouped]], [*sides, *split[grouped]])
    del images["counts"]


def write_outputs(result: ValidationResult, batches: dict[str, Batch]) -> None:
    """Writes data/accepted (a file per batch), data/quarantine.parquet and data/classes (a file per role)."""
    by_key = result.images.sort_values(["arrival", "key"])
    good = by_key["reason"] == ""
    for arrival, (name, batch) in enumerate(batches.items()):
        rows = by_key[good & (by_key["arrival"] == arrival)]
        write_table(rows[ACCEPTED.names], ACCEPTED, layout.accepted(batch.role, name))
    write_table(by_key.loc[~good, QUARANTINE.names], QUARANTINE, layout.QUARANTINE)
    for role in ROLES:
        write_text(layout.classes(role), json.dumps(result.classes[role], indent=1, ensure_ascii=False) + "\n")
