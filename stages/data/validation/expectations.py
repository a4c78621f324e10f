"""What is expected of images, batches, classes and of drift: one readable table, checked by Great Expectations."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from stages.params.validate import Severity, Validate

Scope = Literal["image", "batch", "batch class", "class", "drift"]

SHOWN = 5  # keys and classes that a message names

# In the words of Great Expectations.
SEVERITIES: dict[Severity, str] = {"stop": "critical", "quarantine": "warning", "note": "info"}


Check = tuple[str, dict[str, Any]]
"""A Great Expectations class and its keywords."""


def at_least(limit: float) -> Check:
    """A number from `limit` on."""
    return "ExpectColumnValuesToBeBetween", {"min_value": limit}


def at_most(limit: float) -> Check:
    """A number up to `limit`."""
    return "ExpectColumnValuesToBeBetween", {"max_value": limit}


def one_of(*values: object) -> Check:
    """One of these values."""
    return "ExpectColumnValuesToBeInSet", {"value_set": list(values)}


def none() -> Check:
    """No value at all."""
    return "ExpectColumnValuesToBeNull", {}


@dataclass(frozen=True)
class Expectation:
    """A row of the table."""

    name: str
    scope: Scope
    severity: Severity
    column: str
    check: Check
    parameter: str
    """The key of params.yaml that sets the limit; empty where there is none."""
    reason: str
    """Why a person should care when it fails, in plain words."""
    fault: str = ""
    """What to call the images that fail it."""

    @property
    def limit(self) -> str:
        """What is demanded of the column, for people: `≥ 16`, `JPEG, PNG`, `none`."""
        _, arguments = self.check
        match arguments:
            case {"value_set": values}:
                return ", ".join({True: "yes", False: "no"}.get(value, str(value)) for value in values)
            case {"min_value": limit}:
                return f"≥ {_number(limit)}"
            case {"max_value": limit}:
                return f"≤ {_number(limit)}"
        return "none"


def _number(value: float) -> str:
    return f"{value:,.10g}"


LEAK, EXACT, NEAR = "no_leak_of_test", "no_exact_duplicate", "no_near_duplicate"


def expectations(limits: Validate) -> list[Expectation]:
    """The whole table, in the order in which it is gone through."""
    return [
        *image_expectations(limits),
        *outlier_expectations(limits),
        *duplicate_expectations(limits),
        *table_expectations(limits),
    ]


def _rows_of(scope: Scope, limits: Validate) -> Callable[..., Expectation]:
    def row(name: str, column: str, check: Check, parameter: str, reason: str, fault: str = "") -> Expectation:
        severity = getattr(limits.severity, name)
        return Expectation(name, scope, severity, column, check, parameter, reason, fault)

    return row


def image_expectations(limits: Validate) -> list[Expectation]:
    """Of every image by itself; one that fails is, as a rule, quarantined, and named after the first that it fails.

    The order is from what says most: a text file does not decode either, but "not an image" tells more.
    """
    image = _rows_of("image", limits)
    return [
        image(name="not_empty", column="bytes", check=at_least(1), parameter="",
              fault="empty files", reason="The file has no bytes at all."),
        image(name="known_format", column="format", check=one_of(*limits.formats), parameter="validate.formats",
              fault="not images", reason="Its first bytes are of no image format that we read, whatever its name."),
        image(name="sane_size", column="pixels", check=at_most(limits.max_pixels), parameter="validate.max_pixels",
              fault="too many pixels", reason="So many pixels that decoding it could take the machine down."),
        image(name="decodes", column="decodes", check=one_of(True), parameter="",
              fault="damaged",
              reason="It does not decode to its last byte. A loader would crash on it, or train on grey."),
        image(name="large_enough", column="short_side", check=at_least(limits.min_side), parameter="validate.min_side",
              fault="too small", reason="Too few pixels on its shorter side to show anything."),
        image(name="sane_aspect", column="aspect", check=at_most(limits.max_aspect), parameter="validate.max_aspect",
              fault="too narrow", reason="So long and narrow that a square crop shows almost nothing of it."),
        image(name="not_flat", column="contrast", check=at_least(limits.min_contrast),
              parameter="validate.min_contrast",
              fault="one flat colour", reason="One flat colour: nothing to learn from."),
    ]  # fmt: skip


def outlier_expectations(limits: Validate) -> list[Expectation]:
    """Of every sound image among those of its own batch, so that no later batch changes what was said of it."""
    image = _rows_of("image", limits)
    return [
        image(name=name, column=f"{fact}_outlying", check=at_most(limit), parameter=f"validate.outliers.{fact}",
              fault=fault, reason=reason)
        for name, fact, limit, fault, reason in (
            ("usual_resolution", "resolution", limits.outliers.resolution, "of unusual resolution",
             "Far more or far fewer pixels than its batch has: a thumbnail, a scan, a picture from another source."),
            ("usual_brightness", "brightness", limits.outliers.brightness, "unusually dark or bright",
             "Far darker or brighter than its batch: a shot at night, a document, a broken exposure."),
        )
        if limit is not None
    ]  # fmt: skip


def duplicate_expectations(limits: Validate) -> list[Expectation]:
    """Of every image among those that came before it; only images that pass all others are compared."""
    image = partial(_rows_of("image", limits), check=none())
    return [
        image(name=LEAK, column="leak_of", parameter="validate.near_duplicate_distance",
              fault="leaks of test images into train",
              reason="An image of train is the same picture as one of test, fresh or val that stays: the score would "
                     "count what was learnt by heart."),
        image(name=EXACT, column="duplicate_of", parameter="", fault="exact duplicates",
              reason="The same bytes as an image that stays: it would count twice, or test what was trained on."),
        image(name=NEAR, column="near_duplicate_of", parameter="validate.near_duplicate_distance",
              fault="near-duplicates",
              reason="The same picture as an image that stays (resized, recoded, brightened); confirmed on pixels."),
    ]  # fmt: skip


def table_expectations(limits: Validate) -> list[Expectation]:
    """Of batches, classes and drift, as counted after the images were judged."""
    batch, of_class = _rows_of("batch", limits), _rows_of("class", limits)
    rows = [
        batch(name="some_accepted", column="accepted", check=at_least(1), parameter="",
              reason="A batch of which nothing is left brings nothing."),
        batch(name="few_quarantined", column="share_quarantined", check=at_most(limits.max_quarantined),
              parameter="validate.max_quarantined",
              reason="So much of a batch is bad that something went wrong before it came here."),
        batch(name="labelled", column="unlabelled", check=at_most(0), parameter="",
              reason="Fine-tuning learns from labels; an image without one is of no use to it."),
        _rows_of("batch class", limits)(
              name="varied_class", column="share_alike", check=at_most(limits.collapse.max_share),
              parameter="validate.collapse",
              reason="So many images of a class are one picture, or look like it, that its label is in doubt: a "
                     "placeholder, a video, the wrong folder."),
        of_class(name="enough_to_train", column="train", check=at_least(limits.min_images_per_class),
                 parameter="validate.min_images_per_class",
                 reason="A class that training hardly sees will never be predicted."),
        of_class(name="balanced", column="imbalance", check=at_most(limits.max_imbalance),
                 parameter="validate.max_imbalance",
                 reason="The largest class has so many times its training images that it is seldom predicted."),
        of_class(name="known_class", column="new_in", check=none(), parameter="validate.allow_new_classes",
                 reason="A later batch brings a class that the target task does not have: a new one, or a misspelt "
                        "folder."),
        _rows_of("drift", limits)(
              name="no_drift", column="unexplained", check=one_of(False), parameter="validate.drift",
              reason="The batch looks different from all that came before it in its role."),
    ]  # fmt: skip
    if limits.allow_new_classes:
        rows = [row for row in rows if row.name != "known_class"]
    return [replace(row, severity="stop") if row.name == "no_drift" and limits.drift.stop else row for row in rows]


def with_measures(facts: pd.DataFrame) -> pd.DataFrame:
    """The columns that the image expectations look at, one row an image.

    What is unknown (sizes of broken headers) is NaN, and NaN passes: another expectation fails there.
    """
    width, height = (facts[side].to_numpy(np.float64) for side in ("width", "height"))
    known = (width > 0) & (height > 0)
    short, long = np.minimum(width, height), np.maximum(width, height)
    return pd.DataFrame(
        {
            "bytes": facts["bytes"].to_numpy(),
            "format": facts["format"].to_numpy(),
            "decodes": facts["decodes"].to_numpy(),
            "contrast": facts["contrast"].to_numpy(),
            "pixels": np.where(known, width * height, np.nan),
            "short_side": np.where(known, short, np.nan),
            "aspect": np.divide(long, short, out=np.full(len(facts), np.nan), where=known),
        }
    )


# A batch of images of one size is no reason to call one that is a pixel wider an outlier.
LEAST_SPREAD = {"resolution": 1.0, "brightness": 16.0}  # in octaves, in levels
FEWEST_FOR_QUARTILES = 20


def outlying(images: pd.DataFrame) -> pd.DataFrame:
    """How far each image lies beyond the middle half of its own batch, in widths of that half; 0 within it.

    Tukey's fences (1977): quartiles do not move with the outliers that they are to find.

    Args:
        images: sound ones, columns arrival, width, height, brightness.

    Returns:
        Columns resolution_outlying and brightness_outlying, float64. All 0 in batches of fewer than 20 images.
    """
    pixels = images["width"].to_numpy(np.float64) * images["height"].to_numpy(np.float64)
    facts = {"resolution": np.log2(np.maximum(pixels, 1)), "brightness": images["brightness"].to_numpy(np.float64)}
    beyond = {f"{fact}_outlying": np.zeros(len(images)) for fact in facts}
    arrival = images["arrival"].to_numpy()
    for batch in np.unique(arrival):
        rows = arrival == batch
        if rows.sum() < FEWEST_FOR_QUARTILES:
            continue
        for fact, values in facts.items():
            low, high = np.quantile(values[rows], [0.25, 0.75])
            spread = max(high - low, LEAST_SPREAD[fact])
            distance = np.maximum(low - values[rows], values[rows] - high)
            beyond[f"{fact}_outlying"][rows] = np.maximum(distance, 0) / spread
    return pd.DataFrame(beyond, index=images.index)


def failures(table: pd.DataFrame, expectations: Sequence[Expectation]) -> dict[str, np.ndarray]:
    """Validates `table` with Great Expectations.

    Returns:
        Name of each expectation → positions (int64, ascending) of the rows that fail it.

    Raises:
        RuntimeError: Great Expectations could not evaluate an expectation.
    """
    if table.empty or not expectations:
        return {expectation.name: np.empty(0, np.int64) for expectation in expectations}
    gx, validate = _great_expectations()
    rows = table.assign(row=np.arange(len(table)))
    suite = gx.ExpectationSuite(name="suite", expectations=[_as_gx(gx, expectation) for expectation in expectations])
    results = validate(rows, suite).results
    by_name = {result.expectation_config.meta["name"]: result for result in results}
    return {expectation.name: _failing_rows(by_name[expectation.name]) for expectation in expectations}


def first_failures(count: int, expectations: Sequence[Expectation], failed: dict[str, np.ndarray]) -> np.ndarray:
    """(count,) objects: name of the first expectation in table order that quarantines a row; empty where none does."""
    reason = np.full(count, "", dtype=object)
    for expectation in reversed(expectations):
        if expectation.severity == "quarantine":
            reason[failed[expectation.name]] = expectation.name
    return reason


def _as_gx(gx: Any, expectation: Expectation) -> Any:
    kind, arguments = expectation.check
    return getattr(gx.expectations, kind)(
        column=expectation.column,
        severity=SEVERITIES[expectation.severity],
        meta={"name": expectation.name, "reason": expectation.reason},
        **arguments,
    )


def _failing_rows(result: Any) -> np.ndarray:
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(f"{result.expectation_config.meta['name']}: {result.exception_info['exception_message']}")
    rows = np.array([row["row"] for row in result.result["unexpected_index_list"]], dtype=np.int64)
    # Great Expectations cuts some of its lists (`unexpected_list` at 200); a cut one must not pass for whole.
    if len(rows) != result.result["unexpected_count"]:
        raise RuntimeError(f"{result.expectation_config.meta['name']}: only {len(rows)} of the failing rows are listed")
    return np.sort(rows)


@cache
def _great_expectations() -> tuple[Any, Callable[[pd.DataFrame, Any], Any]]:
    """The package (it takes 4 to 9 s to import, so only who validates pays) and a function (table, suite) → result."""
    os.environ |= {"GX_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    logging.getLogger("great_expectations").setLevel(logging.WARNING)  # it narrates its own start at level INFO
    import great_expectations as gx
    import great_expectations.expectations
    from great_expectations.data_context.types import base

    # In memory altogether: its default keeps a folder for Data Docs outside the checkout.
    stores = base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    config = base.DataContextConfig(
        store_backend_defaults=stores, progress_bars=base.ProgressBarsConfig(globally=False)
    )
    context = gx.get_context(mode="ephemeral", project_config=config)
    asset = context.data_sources.add_pandas("rows").add_dataframe_asset("rows")
    whole = asset.add_batch_definition_whole_dataframe("whole")
    complete = {
        "result_format": "COMPLETE",
        "unexpected_index_column_names": ["row"],
        "return_unexpected_index_query": False,
    }

    def validate(table: pd.DataFrame, suite: Any) -> Any:
        return whole.get_batch(batch_parameters={"dataframe": table}).validate(suite, result_format=complete)

    return gx, validate


# ------------------------------------------------------------------------------------------------ in words


def explain(expectation: Expectation, wrong: pd.DataFrame, images: pd.DataFrame) -> list[str]:
    """One message a batch, or a role, about the rows of a table that fail `expectation`: what, where, what governs it.

    Args:
        expectation: one of a table, that stops or is noted.
        wrong: failing rows of the table of its scope (columns: see stages/validate.py).
        images: all of them, with reason (empty: accepted).
    """
    limit = f"{expectation.limit}, {expectation.parameter}"
    stops = expectation.severity == "stop"  # and only then does somebody have to do something
    match expectation.name:
        case "some_accepted":
            return [
                f"{_batch(row)}: none of {row['images']} images is accepted{_worst(images, row['batch'])}"
                for row in _records(wrong)
            ]
        case "few_quarantined":
            return [
                f"{_batch(row)}: {row['share_quarantined']:.1%} are quarantined, {row['quarantined']:,} of "
                f"{row['images']:,} images ({limit}){_worst(images, row['batch'])}"
                for row in _records(wrong[wrong["accepted"] > 0])  # of the others `some_accepted` has said it
            ]
        case "labelled":
            return [
                f"{_batch(row)}: {row['unlabelled']:,} images have no class; put each into the folder of its class"
                for row in _records(wrong)
            ]
        case "enough_to_train":
            return [
                f"{role}: too few accepted training images ({limit}) of {len(rows)} classes: "
                + _some([f"{row['class_name']} has {row['train']}" for row in _records(rows)])
                for role, rows in wrong.groupby("role", sort=False)
            ]
        case "varied_class":
            return [
                f"{_batch(rows.iloc[0])}: classes of which too many images are one picture, or look like it "
                f"({expectation.limit}, {expectation.parameter}.max_share): "
                + _some([f"{row['class_name']} {row['alike']:,} of {row['images']:,}" for row in _records(rows)])
                for _, rows in wrong.groupby("batch", sort=False)
            ]
        case "balanced":
            return [
                f"{role}: {len(rows):,} {'class has' if len(rows) == 1 else 'classes have'} so few training images "
                f"that the largest has too many times as many ({limit}): "
                + _some([f"{row['class_name']} has {row['train']:,} of {row['largest']:,}" for row in _records(rows)])
                for role, rows in wrong.groupby("role", sort=False)
            ]
        case "known_class":
            return [
                f"batch `{batch}` (finetune): new classes: {_some(list(rows['class_name']))}"
                + (f"; rename the folders, or let them in by {expectation.parameter}: true" if stops else "")
                for batch, rows in wrong.groupby("new_in", sort=False)
            ]
        case "no_drift":
            return [
                f"{_batch(rows.iloc[0])}: drifts from the earlier ones in "
                + _some([f"{row['fact']} (KS distance {row['distance']:.3f})" for row in _records(rows)])
                + (
                    f"; give the reason as batches.{batch}.accept_drift, or let it be noted only: "
                    f"{expectation.parameter}.stop: false and validate.severity.no_drift: note"
                    if stops
                    else ""
                )
                for batch, rows in wrong.groupby("batch", sort=False)
            ]
    raise AssertionError(f"no words for {expectation.name}")


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    return table.to_dict("records")


def _batch(row: Any) -> str:
    return f"batch `{row['batch']}` ({row['role']})"


def _worst(images: pd.DataFrame, batch: str) -> str:
    """What was wrong with a batch: counts by reason, and the first few keys."""
    bad = images[(images["batch"] == batch) & (images["reason"] != "")].sort_values("key")
    if bad.empty:
        return ""
    counts = ", ".join(f"{reason} {count:,}" for reason, count in bad["reason"].value_counts().items())
    first = []
    for row in _records(bad.head(SHOWN)):
        why = f" of {row['duplicate_of']}" if row["duplicate_of"] else f": {row['error']}" if row["error"] else ""
        first.append(printable(f"{row['key']} ({row['reason']}{why})"))
    return f": {counts}. First: {'; '.join(first)}"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return ", ".join(printable(item) for item in items[:SHOWN]) + more


def printable(text: str) -> str:
    """File and class names come from strangers: control characters are escaped before they reach a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
