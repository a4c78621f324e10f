"""validate: all facts -> accepted and quarantined images, classes, and a page that says why."""

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data.raw.facts import ACCEPTED, QUARANTINE, read_table, write_table
from stages.data.validation.drift import FACTS, FactDrift, compare
from stages.data.validation.expectations import (
    EXACT,
    LEAK,
    NEAR,
    Expectation,
    duplicate_expectations,
    expectations,
    explain,
    failures,
    first_failures,
    image_expectations,
    outlier_expectations,
    outlying,
    table_expectations,
    with_measures,
)
from stages.data.validation.near_duplicates import SamePicture, find_duplicates, look_alikes
from stages.data.validation.page import render
from stages.data.validation.pixel_match import maker, pixel_confirmation
from stages.data.validation.splits import PRECEDENCE, assign_splits, class_list, labels, precedence
from stages.params.batches import ROLES, Batch, load_batches
from stages.params.split import Split
from stages.params.validate import Validate
from stages.runtime.command import StageError, run
from stages.runtime.files import write_text
from stages.runtime.fingerprint import prune, work_folder
from stages.runtime.params_file import load_section

logger = logging.getLogger(__name__)
DATA, REPORTS = Path("data"), Path("reports")
FAILED = Path(".synset/validation-failed")
WORK = Path(".synset/work")
Confirmation = Callable[[pd.DataFrame, Sequence[Path], Validate], SamePicture]


def main() -> None:
    """Judges all batches and writes what follows from it; where the whole is not fit, writes nothing but why."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    batches, limits = load_batches(), load_section("validate", Validate)
    sweep(batches)
    images = read_facts(batches)
    assign(images, batches, load_section("split", Split))
    verdict = judge(images, batches, limits, partial(pixel_confirmation, kept=kept_thumbnails()))
    report = summary(verdict, batches, limits)
    page = render(report, verdict.images, DATA / "raw", verdict.noted, verdict.collapsed)
    folder = FAILED if verdict.stops else REPORTS
    write_text(folder / "validation.json", as_json(report))
    write_text(folder / "validation.html", page)
    if verdict.stops:
        reasons = "".join(f"\n  - {stop}" for stop in verdict.stops)
        raise StageError(
            f"not fit for training, so nothing was written:{reasons}\n  the whole picture: {folder}/validation.html"
        )
    write_outputs(verdict, batches)
    for name, counts in report["batches"].items():
        logger.info("validate %s: %d accepted, %d quarantined", name, counts["accepted"], counts["quarantined"])


def kept_thumbnails() -> Path:
    """The file of thumbnails for the next time; those of other code are removed."""
    folder = work_folder("validate", maker())
    prune(folder.parent, keep=folder)
    return folder / "thumbnails.npz"


def sweep(batches: dict[str, Batch]) -> None:
    """Removes what batches no longer listed left in data/: DVC lets it lie, and the next training would read it.

    And their unfinished work: of a killed ingest that may be as large as the source.
    """
    for path in sorted(WORK.glob("*@*")):
        if path.name.partition("@")[2] not in batches:
            logger.info("validate: removing %s (params.yaml lists no such batch)", path)
            shutil.rmtree(path)
    for kind in ("raw", "facts", "shards", "accepted"):
        for role in ROLES:
            # A stage that was killed leaves `.<batch>.tmp`; .gitkeep stays.
            for path in sorted({*(DATA / kind / role).glob("[!.]*"), *(DATA / kind / role).glob(".*.tmp")}):
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
        path = DATA / "facts" / batch.role / f"{name}.parquet"
        if not path.exists():
            raise StageError(f"{path} is missing; `dvc repro scan@{name}` makes it, `dvc pull` brings it")
        tables.append(read_table(path).assign(role=batch.role, arrival=arrival))
    return pd.concat(tables, ignore_index=True)


def assign(images: pd.DataFrame, batches: dict[str, Batch], limits: Split) -> None:
    """Adds the column `split`, batch by batch."""
    first_finetune = next((name for name, batch in batches.items() if batch.role == "finetune"), None)
    images["split"] = ""
    for arrival, (name, batch) in enumerate(batches.items()):
        rows = images.loc[images["arrival"] == arrival, ["source_split", "sha256"]]
        later = batch.role == "finetune" and name != first_finetune
        images.loc[rows.index, "split"] = assign_splits(rows["source_split"], rows["sha256"], later, limits)


@dataclass
class Verdict:
    """What came of it. `images` has, beyond the facts, role, arrival, split, label, reason (empty: accepted),
    duplicate_of (key of the image that is the same and stays), resolution_outlying and brightness_outlying (NaN: not
    judged) and look (images of a class in a batch that look alike have the same number; -1: not judged)."""

    images: pd.DataFrame
    classes: dict[str, list[str]]
    batch_table: pd.DataFrame
    class_table: pd.DataFrame
    collapsed: pd.DataFrame
    """The rows of `look_table` that fail, most alike first."""
    drift: dict[str, list[FactDrift]]
    expectations: list[Expectation]
    failed: dict[str, int]
    noted: dict[str, np.ndarray]
    """Expectation of images whose severity is `note` → positions of the accepted images that fail it."""
    stops: list[str]
    notes: list[str]

    @property
    def accepted(self) -> pd.DataFrame:
        """The images that pass all row-level expectations."""
        return self.images[self.images["reason"] == ""]


def judge(
    images: pd.DataFrame,
    batches: dict[str, Batch],
    limits: Validate,
    confirmation: Confirmation = pixel_confirmation,
) -> Verdict:
    """First each image by itself, then as a duplicate of those before it, then batches, classes and drift.

    Args:
        images: facts of all batches with role, arrival and split; in any order.
        batches: in order of arrival.
        limits: what is expected.
        confirmation: how a match of hashes is confirmed.
    """
    images = in_order_of_precedence(images)
    by_themselves = image_expectations(limits)
    failed = failures(with_measures(images), by_themselves)
    images["reason"] = first_failures(len(images), by_themselves, failed)
    failed |= _judge_outliers(images, limits)
    failed |= _judge_duplicates(images, limits, confirmation)
    classes = _label(images, batches)
    drift = _drift(images.loc[images["reason"] == "", ["role", "arrival", *FACTS]], batches, limits)
    tables = {
        "batch": batch_table(images, batches),
        "batch class": look_table(images, batches, limits),
        "class": class_table(images, batches, classes),
        "drift": drift_table(drift, batches),
    }
    words: dict[str, list[str]] = {"stop": [], "note": []}
    of_tables = table_expectations(limits)
    for scope, table in tables.items():
        wrong = failures(table, [expectation for expectation in of_tables if expectation.scope == scope])
        failed |= wrong
        for expectation in of_tables:
            if len(wrong.get(expectation.name, ())):
                words[expectation.severity] += explain(expectation, table.iloc[wrong[expectation.name]], images)
    whole = expectations(limits)
    good = (images["reason"] == "").to_numpy()
    return Verdict(
        images=images,
        classes=classes,
        batch_table=tables["batch"],
        class_table=tables["class"],
        collapsed=tables["batch class"].iloc[failed["varied_class"]].sort_values("share_alike", ascending=False),
        drift=drift,
        expectations=whole,
        failed={name: len(rows) for name, rows in failed.items()},
        noted={
            each.name: failed[each.name][good[failed[each.name]]]
            for each in whole
            if each.scope == "image" and each.severity == "note"
        },
        stops=words["stop"],
        notes=words["note"],
    )


def in_order_of_precedence(images: pd.DataFrame) -> pd.DataFrame:
    """From the image that stays against all others to the one that yields to all: by arrival, split, key."""
    rank = precedence(images["split"].to_numpy(dtype=object))
    ordered = images.assign(rank=rank).sort_values(["arrival", "rank", "key"], ignore_index=True)
    return ordered.drop(columns="rank")


def _judge_outliers(images: pd.DataFrame, limits: Validate) -> dict[str, np.ndarray]:
    """Adds the columns of `outlying`, and fills in `reason` where an outlier is quarantined; positions that fail."""
    sound = np.flatnonzero((images["reason"] == "").to_numpy())
    measures = outlying(images[["arrival", "width", "height", "brightness"]].iloc[sound])
    images[measures.columns.tolist()] = np.nan
    for column in measures:
        images.loc[sound, column] = measures[column]
    of_outliers = outlier_expectations(limits)
    failed = failures(images[measures.columns], of_outliers)
    reason = first_failures(len(images), of_outliers, failed)
    images["reason"] = np.where(images["reason"] == "", reason, images["reason"])
    return failed


def _judge_duplicates(images: pd.DataFrame, limits: Validate, confirmation: Confirmation) -> dict[str, np.ndarray]:
    """Adds `duplicate_of` and `look`, and fills in `reason` of what yields; positions that fail each expectation."""
    sound = np.flatnonzero((images["reason"] == "").to_numpy())
    rows = images[_FOR_DUPLICATES].iloc[sound]
    found = find_duplicates(rows, limits, confirmation(rows, _raw_folders(rows), limits))
    images["look"] = np.int64(-1)
    images.loc[sound, "look"] = look_alikes(rows, found.same)
    yielding = np.flatnonzero(found.yields_to >= 0)
    below, above = sound[yielding], sound[found.yields_to[yielding]]
    trains = (images["split"] == "train").to_numpy()
    leak, exact = trains[below] & ~trains[above], found.exact[yielding]
    duplicate_of = np.full(len(images), "", dtype=object)
    duplicate_of[below] = images["key"].iloc[above].to_numpy(dtype=object)
    images["duplicate_of"] = duplicate_of
    columns = {name: np.full(len(images), None, dtype=object) for name in _DUPLICATE_COLUMNS.values()}
    for name, which in ((LEAK, leak), (EXACT, exact & ~leak), (NEAR, ~exact & ~leak)):
        columns[_DUPLICATE_COLUMNS[name]][below[which]] = duplicate_of[below[which]]
    of_duplicates = duplicate_expectations(limits)
    failed = failures(pd.DataFrame(columns), of_duplicates)
    reason = first_failures(len(images), of_duplicates, failed)
    images["reason"] = np.where(images["reason"] == "", reason, images["reason"])
    return failed


_FOR_DUPLICATES = [
    "arrival", "role", "batch", "class_name", "sha256", "hash", "brightness", "contrast", "tar", "offset", "bytes",
]  # fmt: skip
_DUPLICATE_COLUMNS = {LEAK: "leak_of", EXACT: "duplicate_of", NEAR: "near_duplicate_of"}


def _raw_folders(images: pd.DataFrame) -> list[Path]:
    """Folder of the raw tars of each image."""
    first = images.drop_duplicates("arrival")
    folders = {
        arrival: DATA / "raw" / role / batch
        for arrival, role, batch in zip(first["arrival"], first["role"], first["batch"], strict=True)
    }
    return [folders[arrival] for arrival in images["arrival"].tolist()]


def _label(images: pd.DataFrame, batches: dict[str, Batch]) -> dict[str, list[str]]:
    """Adds the column `label`; returns the class list of each role, classes of quarantined images included."""
    images["label"] = np.int32(-1)
    classes: dict[str, list[str]] = {}
    for role in ROLES:
        rows = images.loc[images["role"] == role, ["arrival", "class_name"]]
        arrivals = [arrival for arrival, batch in enumerate(batches.values()) if batch.role == role]
        classes[role] = class_list(rows.loc[rows["arrival"] == arrival, "class_name"] for arrival in arrivals)
        images.loc[rows.index, "label"] = labels(rows["class_name"], classes[role])
    return classes


def batch_table(images: pd.DataFrame, batches: dict[str, Batch]) -> pd.DataFrame:
    """A row a batch: batch, role, images, accepted, quarantined, share_quarantined, unlabelled (if finetune)."""
    good = images["reason"] == ""
    nameless = good & (images["class_name"] == "") & (images["role"] == "finetune")
    counts = [
        np.bincount(images["arrival"][rows], minlength=len(batches)) for rows in (slice(None), good, ~good, nameless)
    ]
    table = pd.DataFrame(dict(zip(("images", "accepted", "quarantined", "unlabelled"), counts, strict=True)))
    table["share_quarantined"] = table["quarantined"] / table["images"].clip(lower=1)
    return table.assign(batch=list(batches), role=[batch.role for batch in batches.values()])


def look_table(images: pd.DataFrame, batches: dict[str, Batch], limits: Validate) -> pd.DataFrame:
    """A row a class of a batch, of those with enough sound images to say: batch, role, class_name, images, look (the
    number that most of them have) and share_alike."""
    is_judged = (images["look"] >= 0) & (images["class_name"] != "")
    judged = images.loc[is_judged, ["arrival", "class_name", "look"]]
    alike = judged.groupby(["arrival", "class_name", "look"]).size().rename("alike").reset_index()
    of_class = alike.groupby(["arrival", "class_name"])["alike"]
    alike["images"] = of_class.transform("sum")
    # The first of equally many is the one with the smallest number.
    table = alike.loc[of_class.idxmax()].reset_index(drop=True)
    table = table[table["images"] >= limits.collapse.min_images].reset_index(drop=True)
    names, roles = list(batches), [batch.role for batch in batches.values()]
    return table.assign(
        share_alike=table["alike"] / table["images"],
        batch=[names[arrival] for arrival in table["arrival"]],
        role=[roles[arrival] for arrival in table["arrival"]],
    )


def class_table(images: pd.DataFrame, batches: dict[str, Batch], classes: dict[str, list[str]]) -> pd.DataFrame:
    """A row a class of a role: role, class_name, accepted images by split, `largest` (training images of the role's
    largest class), `imbalance` (how many times this one's that is) and `new_in`: the later finetune batch that brought
    it (none for a class that was there from the start)."""
    is_accepted = (images["reason"] == "") & (images["class_name"] != "")
    accepted = images.loc[is_accepted, ["role", "class_name", "split"]]
    index = pd.MultiIndex.from_tuples(
        [(role, name) for role in ROLES for name in classes[role]], names=["role", "class_name"]
    )
    counts = accepted.groupby(["role", "class_name", "split"]).size().unstack("split")
    table = counts.reindex(index=index, columns=list(PRECEDENCE)).fillna(0).astype(np.int64).reset_index()
    table["largest"] = table.groupby("role")["train"].transform("max")
    table["imbalance"] = table["largest"] / table["train"].where(table["train"] > 0, 0.1)  # never 0 / 0, nor infinite
    is_finetune = (images["role"] == "finetune") & (images["class_name"] != "")
    finetune = images.loc[is_finetune, ["class_name", "arrival"]]
    brought_by = finetune.groupby("class_name")["arrival"].min()
    first = next((arrival for arrival, batch in enumerate(batches.values()) if batch.role == "finetune"), -1)
    names = list(batches)
    new_in = {name: names[arrival] for name, arrival in brought_by.items() if arrival != first}
    is_new = (table["role"] == "finetune") & table["class_name"].isin(list(new_in))
    table["new_in"] = table["class_name"].map(new_in).where(is_new, None).astype(object)
    return table


def _drift(accepted: pd.DataFrame, batches: dict[str, Batch], limits: Validate) -> dict[str, list[FactDrift]]:
    """Of each batch against the accepted images of all earlier ones of its role; empty for the first of a role."""
    drift = {}
    for arrival, (name, batch) in enumerate(batches.items()):
        of_role = accepted[accepted["role"] == batch.role]
        earlier, own = of_role[of_role["arrival"] < arrival], of_role[of_role["arrival"] == arrival]
        drift[name] = compare(own, earlier, limits.drift)
    return drift


def drift_table(drift: dict[str, list[FactDrift]], batches: dict[str, Batch]) -> pd.DataFrame:
    """A row a fact of a batch; `unexplained` where it drifted and the batch has no `accept_drift`."""
    rows = [(name, batches[name].role, *fact) for name, facts in drift.items() for fact in facts]
    table = pd.DataFrame(rows, columns=["batch", "role", *FactDrift._fields])
    excused = table["batch"].map({name: bool(batch.accept_drift) for name, batch in batches.items()}).astype(bool)
    return table.assign(unexplained=table["drifted"].astype(bool) & ~excused)


# ------------------------------------------------------------------------------------------------ what is written


def summary(verdict: Verdict, batches: dict[str, Batch], limits: Validate) -> dict[str, Any]:
    """reports/validation.json: counts and figures, no time, no path, no host."""
    images = verdict.images
    table: dict[str, Any] = {row["batch"]: row for row in verdict.batch_table.to_dict("records")}
    good = images["reason"] == ""
    splits = images[good].groupby(["batch", "split"]).size()
    reasons = images[~good].groupby(["batch", "reason"]).size()
    noted = pd.concat(
        [images["batch"].iloc[rows].to_frame().assign(name=name) for name, rows in verdict.noted.items()]
        or [pd.DataFrame({"batch": [], "name": []})]
    )
    notes = noted.groupby(["batch", "name"]).size()
    return {
        "accepted": int(good.sum()),
        "quarantined": int((~good).sum()),
        "quarantined_by": {name: int(count) for name, count in images.loc[~good, "reason"].value_counts().items()},
        "noted_by": {name: len(rows) for name, rows in verdict.noted.items() if len(rows)},
        "order": list(batches),
        "batches": {
            name: {
                "role": batch.role,
                "images": int(table[name]["images"]),
                "accepted": int(table[name]["accepted"]),
                "quarantined": int(table[name]["quarantined"]),
                "share_quarantined": round(float(table[name]["share_quarantined"]), 6),
                "splits": _counts(splits, name),
                "quarantined_by": _counts(reasons, name),
                "noted_by": _counts(notes, name),
                "accept_drift": batch.accept_drift,
                "drift": [fact._asdict() for fact in verdict.drift[name]],
            }
            for name, batch in batches.items()
        },
        "classes": {role: _class_counts(verdict, role) for role in ROLES},
        "expectations": [
            {
                "name": expectation.name,
                "scope": expectation.scope,
                "severity": expectation.severity,
                "column": expectation.column,
                "check": expectation.check[0],
                "limit": expectation.limit,
                "parameter": expectation.parameter,
                "reason": expectation.reason,
                "fault": expectation.fault,
                "failed": verdict.failed[expectation.name],
            }
            for expectation in verdict.expectations
        ],
        "max_quarantined": limits.max_quarantined,
        "stops": verdict.stops,
        "notes": verdict.notes,
    }


def _counts(counts: pd.Series, batch: str) -> dict[str, int]:
    by_key: dict[Any, int] = counts.to_dict()
    return {key[1]: count for key, count in by_key.items() if key[0] == batch}


def _class_counts(verdict: Verdict, role: str) -> dict[str, dict[str, int]]:
    rows = verdict.class_table[verdict.class_table["role"] == role]
    splits = [split for split in PRECEDENCE if rows[split].any()]
    return {
        name: dict(zip(splits, map(int, counts), strict=True))
        for name, *counts in rows[["class_name", *splits]].itertuples(index=False)
    }


def as_json(report: dict[str, Any]) -> str:
    """The same report as the same text."""
    return json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_outputs(verdict: Verdict, batches: dict[str, Batch]) -> None:
    """data/accepted (a file a batch, by key), data/quarantine.parquet (by arrival, key), data/classes (one a role)."""
    by_key = verdict.images.sort_values(["arrival", "key"])
    good = by_key["reason"] == ""
    for arrival, (name, batch) in enumerate(batches.items()):
        rows = by_key[good & (by_key["arrival"] == arrival)]
        write_table(rows[ACCEPTED.names], ACCEPTED, DATA / "accepted" / batch.role / f"{name}.parquet")
    write_table(by_key.loc[~good, QUARANTINE.names], QUARANTINE, DATA / "quarantine.parquet")
    for role in ROLES:
        write_text(
            DATA / "classes" / f"{role}.json", json.dumps(verdict.classes[role], indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    run(main)
