"""Judges images, batches and classes: what is accepted, what is quarantined and why, and what stops the pipeline."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.validation.drift import FACTS, FactDrift, compare
from stages.data.validation.expectations import CONFLICT, EXACT, LEAK, NEAR, Expectation, Step, expectations
from stages.data.validation.great_expectations import failures
from stages.data.validation.groups import group_table
from stages.data.validation.measures import outlying, with_measures
from stages.data.validation.near_duplicates import SamePicture, find_duplicates, look_alikes
from stages.data.validation.pixel_match import pixel_confirmation
from stages.data.validation.splits import class_list, labels, precedence
from stages.data.validation.tables import batch_table, class_table, drift_table, look_table
from stages.data.validation.words import explain
from stages.params.batches import ROLES, Batch
from stages.params.validate import Validate
from stages.runtime import layout

Confirmation = Callable[[pd.DataFrame, Sequence[Path], Validate], SamePicture]


@dataclass
class ValidationResult:
    """All images and tables as judged.

    `images` has, beyond the facts: role, arrival, split, label, reason (empty: accepted), duplicate_of (key of the same
    image that stays), resolution_outlying and brightness_outlying (NaN: not judged), and look (images of a class in a
    batch that look alike have the same number; -1: not judged). `conflict_with` is the key of the same picture with
    another class (empty: none), which is also its `duplicate_of` if the conflict quarantines it.
    """

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
    old: Collection[str] = (),
) -> ValidationResult:
    """First each image by itself, then as a duplicate of those before it, then batches, classes and drift.

    Args:
        images: facts of all batches with role, arrival and split; in any order.
        batches: in order of arrival.
        limits: what is expected.
        confirmation: how a match of hashes is confirmed.
        old: batches that an older version ingested; the order of their classes stays as it was (`class_list`).
    """
    images = in_order_of_precedence(images)
    images["reason"] = np.full(len(images), "", dtype=object)
    failed = _judge_images(images, with_measures(images), "image", limits)
    failed |= _judge_outliers(images, limits)
    failed |= _judge_duplicates(images, limits, confirmation)
    classes = _label(images, batches, old)
    drift = _drift(images.loc[images["reason"] == "", ["role", "arrival", *FACTS]], batches, limits)
    tables: dict[Step, pd.DataFrame] = {
        "batch": batch_table(images, batches),
        "batch class": look_table(images, batches, limits),
        "class": class_table(images, batches, classes),
        "group": group_table(images),
        "drift": drift_table(drift, batches),
    }
    messages: dict[str, list[str]] = {"stop": [], "note": []}
    whole = expectations(limits)
    for step, table in tables.items():
        of_step = expectations(limits, step)
        wrong = failures(table, of_step)
        failed |= wrong
        for expectation in of_step:
            if len(rows := wrong[expectation.name]):
                messages[expectation.severity] += explain(expectation, table.iloc[rows], images, whole)
    good = (images["reason"] == "").to_numpy()
    return ValidationResult(
        images=images,
        classes=classes,
        batch_table=tables["batch"],
        class_table=tables["class"],
        collapsed=tables["batch class"].iloc[failed["varied_class"]].sort_values("share_alike", ascending=False),
        drift=drift,
        expectations=whole,
        failed={name: len(rows) for name, rows in failed.items()},
        noted={
            expectation.name: failed[expectation.name][good[failed[expectation.name]]]
            for expectation in whole
            if expectation.scope == "image" and expectation.severity == "note"
        },
        stops=messages["stop"],
        notes=messages["note"],
    )


def first_failures(count: int, table: Sequence[Expectation], failed: dict[str, np.ndarray]) -> np.ndarray:
    """(count,) objects: name of the first expectation of `table` that quarantines a row; empty where none does."""
    reason = np.full(count, "", dtype=object)
    for expectation in reversed(table):
        if expectation.severity == "quarantine":
            reason[failed[expectation.name]] = expectation.name
    return reason


def in_order_of_precedence(images: pd.DataFrame) -> pd.DataFrame:
    """Sorted by arrival, split and key: of two duplicates the upper one stays."""
    rank = precedence(images["split"].to_numpy(dtype=object))
    ordered = images.assign(rank=rank).sort_values(["arrival", "rank", "key"], ignore_index=True)
    return ordered.drop(columns="rank")


def _judge_images(images: pd.DataFrame, columns: pd.DataFrame, step: Step, limits: Validate) -> dict[str, np.ndarray]:
    """Fills in `reason` of images that have none and fail an expectation of `step`; positions that fail each."""
    table = expectations(limits, step)
    failed = failures(columns, table)
    images["reason"] = np.where(images["reason"] == "", first_failures(len(images), table, failed), images["reason"])
    return failed


def _judge_outliers(images: pd.DataFrame, limits: Validate) -> dict[str, np.ndarray]:
    """Adds the columns of `outlying`, and fills in `reason` where an outlier is quarantined; positions that fail."""
    sound = np.flatnonzero((images["reason"] == "").to_numpy())
    measures = outlying(images[["arrival", "width", "height", "brightness"]].iloc[sound])
    images[measures.columns.tolist()] = np.nan
    for column in measures:
        images.loc[sound, column] = measures[column]
    return _judge_images(images, images[measures.columns], "outlier", limits)


def _judge_duplicates(images: pd.DataFrame, limits: Validate, confirmation: Confirmation) -> dict[str, np.ndarray]:
    """Adds `duplicate_of` and `look`, and fills in `reason` of what yields; positions that fail each expectation."""
    sound = np.flatnonzero((images["reason"] == "").to_numpy())
    rows = images[_FOR_DUPLICATES].iloc[sound]
    found = find_duplicates(rows, limits, confirmation(rows, _raw_folders(rows), limits))
    images["look"] = np.int64(-1)
    images.loc[sound, "look"] = look_alikes(rows, found.same)
    yielding = np.flatnonzero(found.yields_to >= 0)
    below, above = sound[yielding], sound[found.yields_to[yielding]]
    conflicting = np.flatnonzero(found.conflicts_with >= 0)
    one, other = sound[conflicting], sound[found.conflicts_with[conflicting]]
    trains = (images["split"] == "train").to_numpy()
    leak, exact = trains[below] & ~trains[above], found.exact[yielding]
    keys = images["key"].to_numpy(dtype=object)
    duplicate_of = np.full(len(images), "", dtype=object)
    duplicate_of[one], duplicate_of[below] = keys[other], keys[above]  # what yields, though in conflict, is only noted
    images["duplicate_of"], images["conflict_with"] = duplicate_of, ""
    images.loc[one, "conflict_with"] = keys[other]
    columns = {name: np.full(len(images), None, dtype=object) for name in _DUPLICATE_COLUMNS.values()}
    columns[_DUPLICATE_COLUMNS[CONFLICT]][one] = keys[other]
    for name, which in ((LEAK, leak), (EXACT, exact & ~leak), (NEAR, ~exact & ~leak)):
        columns[_DUPLICATE_COLUMNS[name]][below[which]] = duplicate_of[below[which]]
    return _judge_images(images, pd.DataFrame(columns), "duplicate", limits)


_IN_TAR = ["tar", "offset", "bytes"]
_LOOK = ["width", "height", "hash", "brightness", "contrast"]
_FOR_DUPLICATES = ["arrival", "role", "batch", "class_name", "sha256", *_LOOK, *_IN_TAR]
_DUPLICATE_COLUMNS = {CONFLICT: "conflict_with", LEAK: "leak_of", EXACT: "duplicate_of", NEAR: "near_duplicate_of"}


def _raw_folders(images: pd.DataFrame) -> list[Path]:
    """Folder of the raw tars of each image."""
    first = images.drop_duplicates("arrival")
    folders = {
        arrival: layout.raw(role, batch)
        for arrival, role, batch in zip(first["arrival"], first["role"], first["batch"], strict=True)
    }
    return [folders[arrival] for arrival in images["arrival"].tolist()]


def _label(images: pd.DataFrame, batches: dict[str, Batch], old: Collection[str]) -> dict[str, list[str]]:
    """Adds the column `label`; returns the class list of each role, classes of quarantined images included."""
    images["label"] = np.int32(-1)
    classes: dict[str, list[str]] = {}
    for role in ROLES:
        rows = images.loc[images["role"] == role, ["arrival", "class_name"]]
        of_role = [(arrival, name) for arrival, (name, batch) in enumerate(batches.items()) if batch.role == role]
        classes[role] = class_list(
            (rows.loc[rows["arrival"] == arrival, "class_name"], name in old) for arrival, name in of_role
        )
        images.loc[rows.index, "label"] = labels(rows["class_name"], classes[role])
    return classes


def _drift(accepted: pd.DataFrame, batches: dict[str, Batch], limits: Validate) -> dict[str, list[FactDrift]]:
    """Drift of each batch from the accepted images of all earlier ones of its role; empty for the first of a role."""
    drift = {}
    for arrival, (name, batch) in enumerate(batches.items()):
        of_role = accepted[accepted["role"] == batch.role]
        earlier, own = of_role[of_role["arrival"] < arrival], of_role[of_role["arrival"] == arrival]
        drift[name] = compare(own, earlier, limits.drift)
    return drift
