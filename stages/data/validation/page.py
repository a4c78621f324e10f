"""The validation page: one HTML file that shows a person what came in, what stays out, and why."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from stages.data.raw.images import DAMAGED, to_rgb
from stages.data.raw.tars import read_at
from stages.data.validation.charts import CHARTED, SPLITS, class_chart, fact_charts
from stages.data.validation.expectations import CONFLICT, LEAK
from stages.pages import templates
from stages.pages.images import image_thumbnail
from stages.runtime.command import StageError

SHOWN_PER_REASON = 24
SHOWN_PER_NOTE = 12
SHOWN_COLLAPSED = 12  # classes, and images of each
SHOWN_ALIKE = 8
THUMBNAIL = 96  # longer side in pixels
QUALITY = 72  # of the thumbnails, as JPEG
LARGEST_SHOWN = 50_000_000  # pixels; larger ones are not decoded for a thumbnail


class Tile(NamedTuple):
    """An image on the page. `jpeg` is empty where it cannot be shown, and `note` says why."""

    batch: str
    split: str
    class_name: str
    file: str
    size: str
    jpeg: bytes
    note: str


class Exhibit(NamedTuple):
    """A quarantined or noted image; `stays` is the one that it is the same as, where it is a duplicate."""

    picture: Tile
    stays: Tile | None
    remarks: list[str]


def render(
    report: dict[str, Any],
    images: pd.DataFrame,
    raw: Path,
    noted: Mapping[str, np.ndarray],
    collapsed: pd.DataFrame,
) -> str:
    """The page as HTML: self-contained, the same for the same data.

    Args:
        report: as in reports/validation.json.
        images: all of them: facts with role, arrival, split, reason (empty: accepted), duplicate_of, look and the
            columns that the expectations of outliers look at.
        raw: folder of the raw tars, `<raw>/<role>/<batch>/`, for thumbnails.
        noted: positions in `images` of what is noted of accepted images, by expectation.
        collapsed: classes that look like one picture: batch, arrival, class_name, look, alike, images.
    """
    by_reason, by_note, left = {}, {}, {}
    for expectation in report["expectations"]:
        name, column = expectation["name"], expectation["column"]
        if report["quarantined_by"].get(name):
            rows = images[images["reason"] == name]
            rows = once(rows) if name == CONFLICT else rows
            by_reason[name] = exhibits(rows, images, raw, SHOWN_PER_REASON)
            left[name] = len(rows) - len(by_reason[name])
        if len(noted.get(name, ())):
            rows = images.iloc[noted[name]]
            if name == CONFLICT:
                rows = once(rows.assign(duplicate_of=rows["conflict_with"]))
            if column.endswith("_outlying"):  # what lies furthest out comes first
                rows = rows.nlargest(SHOWN_PER_NOTE, column, keep="first")
            by_note[name] = exhibits(rows, images, raw, SHOWN_PER_NOTE)
            left.setdefault(name, len(noted[name]) - len(by_note[name]))
    accepted = images.loc[images["reason"] == "", ["batch", *CHARTED]]
    return templates.render(
        Path(__file__).with_name("page.html.j2"),
        report=report,
        splits=SPLITS,
        exhibits=by_reason,
        left=left,
        noted=by_note,
        collapsed=[(row, look_alikes(row, images, raw)) for row in collapsed.head(SHOWN_COLLAPSED).to_dict("records")],
        classes={role: class_chart(counts) for role, counts in report["classes"].items() if counts},
        facts={name: fact_charts(accepted[accepted["batch"] == name]) for name in report["order"]},
    )


# ------------------------------------------------------------------------------------------------ quarantined


def exhibits(rows: pd.DataFrame, images: pd.DataFrame, raw: Path, most: int) -> list[Exhibit]:
    """The first of `rows`, by arrival and key, with thumbnails of them and of what they are duplicates of.

    Of many copies of one image, the others come only after a copy of each other one.
    """
    by_key = rows.sort_values(["arrival", "key"])
    copies = by_key.groupby("duplicate_of").cumcount().where(by_key["duplicate_of"] != "", 0)
    chosen = by_key.iloc[np.argsort(copies.to_numpy(), kind="stable")[:most]]
    kept = images[images["key"].isin(set(chosen["duplicate_of"]) - {""})].to_dict("records")
    stays = {row["key"]: row for row in kept}
    shown = []
    for row in chosen.to_dict("records"):
        other = stays.get(row["duplicate_of"])
        shown.append(Exhibit(tile(row, raw), tile(other, raw) if other else None, remarks(row, other)))
    return shown


def once(rows: pd.DataFrame) -> pd.DataFrame:
    """Conflicts of labels without those that are another's seen from the other side."""
    pairs = [tuple(sorted(pair)) for pair in zip(rows["key"], rows["duplicate_of"], strict=True)]
    return rows[~pd.Series(pairs, rows.index, dtype=object).duplicated()]


def remarks(row: dict[Any, Any], stays: dict[Any, Any] | None) -> list[str]:
    """What makes a pair of duplicates worth a second look."""
    if stays is None:
        return []
    notes = []
    if row["split"] == "train" and stays["split"] != "train":
        notes.append("would have leaked into training")
    if row["split"] != "train" and stays["split"] == "train":
        notes.append("training has seen it")
    if row["reason"] == LEAK:
        notes.append("the same bytes" if row["sha256"] == stays["sha256"] else "resized, recoded or brightened")
    if row["class_name"] != stays["class_name"] and row["role"] == stays["role"]:
        notes.append("two classes for one picture")
    if row["batch"] != stays["batch"]:
        notes.append("came in an earlier batch")
    return notes


def look_alikes(row: dict[Any, Any], images: pd.DataFrame, raw: Path) -> list[Tile]:
    """Some of the images of one class that look alike, accepted or not, by key."""
    alike = images[images["look"] == row["look"]].sort_values("key").head(SHOWN_ALIKE)
    return [tile(image, raw) for image in alike.to_dict("records")]


def tile(row: dict[Any, Any], raw: Path) -> Tile:
    """One image as the page shows it."""
    jpeg, note = _thumbnail(row, raw) if row["decodes"] else (b"", row["error"])
    return Tile(
        batch=row["batch"],
        split=row["split"],
        class_name=row["class_name"],
        file=row["key"].split("/", 3)[-1],
        size=f"{row['width']} × {row['height']}" if row["width"] else f"{row['bytes']:,} bytes",
        jpeg=jpeg,
        note=note,
    )


def _thumbnail(row: dict[Any, Any], raw: Path) -> tuple[bytes, str]:
    """A small upright JPEG; or nothing and why."""
    if row["width"] * row["height"] > LARGEST_SHOWN:
        return b"", "too large to show"
    try:
        image = to_rgb(read_at(raw / row["role"] / row["batch"] / row["tar"], row["offset"], row["bytes"]))
    except (StageError, *DAMAGED):
        return b"", "cannot be shown"
    return image_thumbnail(image, THUMBNAIL, QUALITY), ""
