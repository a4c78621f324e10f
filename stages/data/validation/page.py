"""The validation page: one HTML file that shows a person what came in, what stays out, and why."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from stages.data.raw.images import DAMAGED, to_rgb
from stages.data.raw.tars import read_at
from stages.data.validation.expectations import LEAK
from stages.data.validation.splits import PRECEDENCE
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
LISTED_CLASSES = 60  # with more, the smallest and the largest half of so many are listed, beside a chart of all
SIZE_MARKS = [size for power in range(3, 14) for size in (2**power, 3 * 2 ** (power - 1))]  # 8, 12, 16, 24, ...
SPLITS = tuple(reversed(PRECEDENCE))  # train first


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


class Collapsed(NamedTuple):
    """A class of a batch with some of its images that look alike."""

    batch: str
    class_name: str
    alike: int
    images: int
    pictures: list[Tile]


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
    by_reason, by_note = {}, {}
    for expectation in report["expectations"]:
        name, column = expectation["name"], expectation["column"]
        if report["quarantined_by"].get(name):
            by_reason[name] = exhibits(images[images["reason"] == name], images, raw, SHOWN_PER_REASON)
        if len(noted.get(name, ())):
            rows = images.iloc[noted[name]]
            if column.endswith("_outlying"):  # what lies furthest out comes first
                rows = rows.nlargest(SHOWN_PER_NOTE, column, keep="first")
            by_note[name] = exhibits(rows, images, raw, SHOWN_PER_NOTE)
    accepted = images.loc[images["reason"] == "", ["batch", *CHARTED]]
    return templates.render(
        Path(__file__).with_name("page.html.j2"),
        report=report,
        splits=SPLITS,
        exhibits=by_reason,
        noted=by_note,
        collapsed=[collapsed_class(row, images, raw) for row in collapsed.head(SHOWN_COLLAPSED).to_dict("records")],
        classes={role: class_chart(counts) for role, counts in report["classes"].items() if counts},
        facts=[fact_charts(name, accepted[accepted["batch"] == name]) for name in report["order"]],
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


def collapsed_class(row: dict[Any, Any], images: pd.DataFrame, raw: Path) -> Collapsed:
    """Some of the images of one class that look alike, accepted or not, by key."""
    alike = images[images["look"] == row["look"]].sort_values("key").head(SHOWN_ALIKE)
    pictures = [tile(image, raw) for image in alike.to_dict("records")]
    return Collapsed(row["batch"], row["class_name"], row["alike"], row["images"], pictures)


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


# ------------------------------------------------------------------------------------------------ charts


class ClassBar(NamedTuple):
    """A class: its accepted images by split, and these as shares of the largest class (0-100)."""

    name: str
    counts: dict[str, int]
    widths: list[tuple[str, float]]


class ClassChart(NamedTuple):
    """`skyline`: outline (SVG path, 100 high, 1 wide a class) of training images, where classes are too many."""

    total: int
    smallest: int
    median: float
    largest: int
    bars: list[ClassBar]
    lower_bars: list[ClassBar]
    skyline: str
    splits: list[str]


def class_chart(counts: dict[str, dict[str, int]]) -> ClassChart:
    """Few classes are listed in their order; of many, the smallest and the largest by training images."""
    train = {name: splits.get("train", 0) for name, splits in counts.items()}
    widest = max(sum(splits.values()) for splits in counts.values()) or 1
    names, lower, skyline = list(counts), [], ""
    if len(counts) > LISTED_CLASSES:
        by_size = sorted(names, key=lambda name: (train[name], name))
        names, lower = by_size[: LISTED_CLASSES // 2], by_size[-LISTED_CLASSES // 2 :]
        tallest = max(train.values()) or 1
        tops = [f"V{100 - 100 * train[name] / tallest:.2f}h1" for name in reversed(by_size)]
        skyline = f"M0,100{''.join(tops)}V100z"
    values = np.array(sorted(train.values()))
    return ClassChart(
        total=len(counts),
        smallest=int(values[0]),
        median=float(np.median(values)),
        largest=int(values[-1]),
        bars=[_class_bar(name, counts[name], widest) for name in names],
        lower_bars=[_class_bar(name, counts[name], widest) for name in lower],
        skyline=skyline,
        splits=[split for split in SPLITS if any(splits.get(split) for splits in counts.values())],
    )


def _class_bar(name: str, counts: dict[str, int], widest: int) -> ClassBar:
    widths = [(split, round(100 * counts[split] / widest, 2)) for split in SPLITS if counts.get(split)]
    return ClassBar(name, {split: counts[split] for split, _ in widths}, widths)


class Histogram(NamedTuple):
    """Bars as (x, height), both 0-100, of the given width; `marks` are (x, label) on the axis, `median` an x."""

    title: str
    median_label: str
    bars: list[tuple[float, float]]
    width: float
    marks: list[tuple[float, str]]
    median: float


class SizeMap(NamedTuple):
    """Cells as (x, y, opacity): how many images are so wide and so high, on logarithmic axes, 0-100."""

    same: str
    cells: list[tuple[float, float, float]]
    side: float
    marks: list[tuple[float, str]]


class FactCharts(NamedTuple):
    """What the accepted images of one batch are like."""

    batch: str
    sizes: SizeMap | None
    histograms: list[Histogram]
    kinds: list[tuple[str, int]]


CHARTED = ("width", "height", "brightness", "contrast", "bytes", "format", "mode")


def fact_charts(name: str, rows: pd.DataFrame) -> FactCharts:
    """Sizes, brightness, contrast and file sizes of a batch, and its formats and modes by frequency."""
    if rows.empty:
        return FactCharts(name, None, [], [])
    kinds = (
        (rows["format"] + " " + rows["mode"]).value_counts().sort_index().sort_values(ascending=False, kind="stable")
    )
    return FactCharts(
        batch=name,
        sizes=size_map(rows["width"].to_numpy(np.float64), rows["height"].to_numpy(np.float64)),
        histograms=[
            histogram("brightness", rows["brightness"].to_numpy(np.float64), 0, 255, [0, 64, 128, 192, 255]),
            histogram("contrast", rows["contrast"].to_numpy(np.float64), 0, 128, [0, 32, 64, 96, 128]),
            log_histogram("file size", rows["bytes"].to_numpy(np.float64)),
        ],
        kinds=[(str(kind), int(count)) for kind, count in kinds.items()],
    )


def histogram(title: str, values: np.ndarray, low: float, high: float, marks: Iterable[float]) -> Histogram:
    """Of values in [low, high], in 32 bins; what lies outside counts in the outermost."""
    counts, edges = np.histogram(np.clip(values, low, high), bins=32, range=(low, high))
    tallest = max(counts.max(), 1)
    scale = 100 / (high - low)
    return Histogram(
        title=title,
        median_label=f"{np.median(values):.0f}",
        bars=[
            (round((edge - low) * scale, 3), round(100 * count / tallest, 2))
            for edge, count in zip(edges[:-1].tolist(), counts.tolist(), strict=True)
        ],
        width=100 / 32,
        marks=[(round((mark - low) * scale, 2), f"{mark:.0f}") for mark in marks],
        median=round((min(max(float(np.median(values)), low), high) - low) * scale, 2),
    )


def log_histogram(title: str, values: np.ndarray) -> Histogram:
    """Of sizes in bytes, on a logarithmic axis from the power of ten below the smallest to that above the largest."""
    logs = np.log10(np.maximum(values, 1))
    low, high = int(np.floor(logs.min())), int(np.floor(logs.max())) + 1
    chart = histogram(title, logs, low, high, range(low, high + 1))
    marks = [(x, file_size(10 ** int(label))) for x, label in chart.marks]
    return chart._replace(marks=marks, median_label=file_size(float(np.median(values))))


def file_size(count: float) -> str:
    """12,345 → `12 kB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def size_map(width: np.ndarray, height: np.ndarray) -> SizeMap:
    """Width against height in 20 x 20 cells."""
    cells, sides = 20, np.concatenate([width, height])
    if sides.min() == sides.max():
        return SizeMap(f"all {width[0]:.0f} × {height[0]:.0f}", [], 0, [])
    low, high = np.log2(sides.min() / 1.1), np.log2(sides.max() * 1.1)
    edges = np.linspace(low, high, cells + 1)
    counts, _, _ = np.histogram2d(np.log2(width), np.log2(height), bins=[edges, edges])
    opacity = np.sqrt(counts / counts.max())
    side = 100 / cells
    return SizeMap(
        same="",
        cells=[
            (round(x * side, 2), round(100 - (y + 1) * side, 2), round(max(float(opacity[x, y]), 0.12), 2))
            for x, y in zip(*(axis.tolist() for axis in np.nonzero(counts)), strict=True)
        ],
        side=side,
        marks=[
            (round(float((np.log2(mark) - low) / (high - low)) * 100, 2), str(mark))
            for mark in SIZE_MARKS
            if low <= np.log2(mark) <= high and (mark.bit_count() == 1 or high - low < 4)
        ],
    )
