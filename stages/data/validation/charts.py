"""Charts of the validation page: how many images the classes have, and what the images of a batch are like.

Everything that is drawn is in shares of its chart, 0 to 100.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from stages.data.validation.splits import PRECEDENCE

LISTED_CLASSES = 60
"""Of more classes, the smallest and the largest half of this many are listed, beside a chart of all."""
SIZE_MARKS = [size for power in range(3, 14) for size in (2**power, 3 * 2 ** (power - 1))]  # 8, 12, 16, 24, ...
SPLITS = tuple(reversed(PRECEDENCE))  # train first
CHARTED = ["width", "height", "brightness", "contrast", "bytes", "format", "mode"]


class ClassBar(NamedTuple):
    """A class: split, accepted images and width of each part of its bar."""

    name: str
    parts: list[tuple[str, int, float]]


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
    shown = [split for split in SPLITS if counts.get(split)]
    return ClassBar(name, [(split, counts[split], round(100 * counts[split] / widest, 2)) for split in shown])


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
    """What the accepted images of a batch are like; `kinds` are formats and modes by frequency."""

    sizes: SizeMap
    histograms: list[Histogram]
    kinds: list[tuple[str, int]]


def fact_charts(rows: pd.DataFrame) -> FactCharts | None:
    """Of a batch's accepted images, columns CHARTED; None where there are none."""
    if rows.empty:
        return None
    kinds = (rows["format"] + " " + rows["mode"]).value_counts().sort_index()
    kinds = kinds.sort_values(ascending=False, kind="stable")
    facts = rows[["width", "height", "brightness", "contrast", "bytes"]].astype(np.float64)
    width, height, brightness, contrast, size = (facts[name].to_numpy() for name in facts)
    return FactCharts(
        sizes=size_map(width, height),
        histograms=[
            histogram("brightness", brightness, 0, 255, [0, 64, 128, 192, 255]),
            histogram("contrast", contrast, 0, 128, [0, 32, 64, 96, 128]),
            log_histogram("file size", size),
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
