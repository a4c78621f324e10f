"""The whole confusion matrix as one picture, with classes that are confused with each other side by side."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from stages.evaluation.metrics import Int64

HIT, MISS = (31, 95, 158), (180, 71, 44)
"""Colours, as in the page."""
FAINTEST = 110
"""Opacity of a single mistake, of 255."""
LEAST_SIDE = 600
"""Of the picture in pixels; a cell is a whole number of them."""
MOST_ORDERED_BEST = 200
"""Classes. Finding the best order that a tree allows takes time cubic in their number."""


@dataclass(frozen=True)
class ConfusionMap:
    """What the section shows."""

    png: bytes
    """A row per true class, a column per answer, both in the order of `names`."""
    names: Sequence[str]
    cells: Sequence[tuple[int, int, int]]
    """Row, column and count of whatever is not 0."""


def confusion_map(classes: Sequence[str], confusion: Int64) -> ConfusionMap:
    """Sorted by clusters, and drawn.

    Args:
        confusion: (C, C) counts, a row per true class.
    """
    order = clustered(confusion)
    ordered = confusion[np.ix_(order, order)]
    rows, columns = np.nonzero(ordered)
    cells = [(int(row), int(column), int(ordered[row, column])) for row, column in zip(rows, columns, strict=True)]
    return ConfusionMap(_png(ordered), [classes[i] for i in order], cells)


def clustered(confusion: Int64) -> Int64:
    """An order of the classes, (C,), in which classes that are often confused are neighbours.

    Average linkage; the distance is 1 - the mean share of two classes' images that are predicted as the other.
    """
    if len(confusion) < 3:
        return np.arange(len(confusion))
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    distance = 1 - (share + share.T) / 2
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=len(confusion) <= MOST_ORDERED_BEST)
    return leaves_list(tree).astype(np.int64)


def _png(confusion: Int64) -> bytes:
    """Opacity of a cell: the square root of its share of the row, so that rare mistakes are visible."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    pixels = np.zeros((*confusion.shape, 4), np.uint8)
    pixels[..., :3] = MISS
    pixels[np.arange(len(confusion)), np.arange(len(confusion)), :3] = HIT
    pixels[..., 3] = np.where(confusion > 0, np.clip(255 * np.sqrt(share), FAINTEST, 255), 0)
    side = max(1, -(-LEAST_SIDE // max(len(confusion), 1)))
    file = io.BytesIO()
    Image.fromarray(_enlarged(pixels, side)).save(file, "PNG", optimize=False, compress_level=9)
    return file.getvalue()


def _enlarged(pixels: npt.NDArray[np.uint8], times: int) -> npt.NDArray[np.uint8]:
    return np.repeat(np.repeat(pixels, times, axis=0), times, axis=1)
