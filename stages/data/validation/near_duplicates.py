"""Exact duplicates by sha256, near-duplicates by perceptual hash (hamming_pairs.py), confirmed by pixel_match.py."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stages.data.validation.hamming_pairs import BITS, MAX_CANDIDATES, TooManyCandidatesError, pairs_within
from stages.params.validate import Validate
from stages.runtime.command import StageError
from stages.runtime.progress import worker_count

SCALING_SLACK = 2.0
"""Levels by which brightness may differ more than thumbnails do: the facts have it at another scale of the image."""
PLAIN_BITS = 8
"""A hash with at most this many bits unlike the others is plain."""
PLAIN_BRIGHTNESS, PLAIN_CONTRAST = 6.0, 2.0
"""How closely two plain images must agree, in levels of luminance."""
# Beyond these budgets hashes do not tell the images apart at all. ImageNet needs a hundredth.
MAX_PAIRS = 20_000_000  # to confirm on pixels
MAX_COMPARISONS = 20_000_000_000  # of plain images
CHUNK = 2_000_000

SamePicture = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Positions of two images, (P,) and (P,) → whether they are the same picture on pixels, (P,) bool."""


class Duplicates(NamedTuple):
    """Per image: position of the image that it yields to (-1: it stays), and whether the bytes are the same.

    `conflicts_with` is the position of the same picture with another class, or -1. `same` are pairs (P, 2) of positions
    that are the same picture, enough to lead from each to all that it is like.
    """

    yields_to: np.ndarray
    exact: np.ndarray
    conflicts_with: np.ndarray
    same: np.ndarray


def find_duplicates(rows: pd.DataFrame, limits: Validate, same_picture: SamePicture) -> Duplicates:
    """From the top down, each image yields to the first one above it that stays and is the same picture.

    Images that `label_conflicts` finds neither yield nor stay, unless that is only noted. What happens to a row depends
    on the rows above it, and for conflicts on those of its batch, so later batches never change it.

    Args:
        rows: images in order of precedence, columns sha256, hash, brightness, contrast, arrival, role, class_name.
        limits: what counts as near.
        same_picture: confirms hash matches on pixels; never asked about images with the same bytes.
    """
    codes, _ = pd.factorize(rows["sha256"])
    _, first = np.unique(codes, return_index=True)
    original = first[codes]  # factorize numbers by first appearance, so this is the topmost row with these bytes
    distinct = np.flatnonzero(original == np.arange(len(rows)))
    near = _near_duplicates(rows, distinct, limits, same_picture)
    copy = original != np.arange(len(rows))
    same = np.concatenate([near, np.stack([original[copy], np.flatnonzero(copy)], axis=1)])
    conflicts_with = label_conflicts(rows, original, near)
    judged = (conflicts_with < 0) | (limits.severity.no_label_conflict != "quarantine")
    yields_to, exact = _yielding(original, near, judged)
    return Duplicates(yields_to, exact, conflicts_with, same)


def label_conflicts(rows: pd.DataFrame, original: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Position of the first image of the same role that is the same picture and has another class, (N,); -1: none.

    Only images of the same batch or an earlier one count: of two batches the later one's image is in conflict, within a
    batch all are. Images without a class conflict with nobody.

    Args:
        rows: as given to `find_duplicates`.
        original: position of the first image with the same bytes, (N,).
        near: pairs (P, 2) of such first images that are the same picture.
    """
    labelled = pd.DataFrame({name: rows[name].to_numpy() for name in ("arrival", "role", "class_name")}).assign(
        position=np.arange(len(rows)), content=original
    )
    labelled = labelled[labelled["class_name"] != ""]
    # The first image of each class is of the earliest batch, so the others of the class need no look.
    other = labelled.drop_duplicates(["content", "role", "class_name"])
    itself = np.repeat(np.unique(original)[:, None], 2, axis=1)
    alike = pd.DataFrame(np.concatenate([itself, near, near[:, ::-1]]), columns=["content", "content_other"])
    met = labelled.merge(alike, on="content").merge(
        other.rename(columns={"content": "content_other"}), on=["content_other", "role"], suffixes=("", "_other")
    )
    met = met[(met["class_name"] != met["class_name_other"]) & (met["arrival_other"] <= met["arrival"])]
    found = met.groupby("position")["position_other"].min()
    conflicts_with = np.full(len(rows), -1, dtype=np.int64)
    conflicts_with[found.index.to_numpy(np.int64)] = found.to_numpy(np.int64)
    return conflicts_with


def _yielding(original: np.ndarray, near: np.ndarray, judged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position that each of the images `judged` yields to (-1: none), and whether for the same bytes, (N,) each."""
    count = len(original)
    # The first judged image with the same bytes stands for them; `count` where there is none.
    stands = np.full(count + 1, count, dtype=np.int64)
    np.minimum.at(stands, original[judged], np.flatnonzero(judged))
    pairs = np.sort(stands[near], axis=1)
    pairs = pairs[pairs[:, 1] < count]
    yields_to = np.full(count, -1, dtype=np.int64)
    for above, below in pairs[np.lexsort(pairs.T)].tolist():
        if yields_to[below] < 0 and yields_to[above] < 0:
            yields_to[below] = above
    first = stands[original]
    copy = judged & (first != np.arange(count))
    of_first = yields_to[first[copy]]
    exact = np.zeros(count, dtype=bool)
    exact[copy] = of_first < 0
    yields_to[copy] = np.where(of_first < 0, first[copy], of_first)
    return yields_to, exact


def look_alikes(rows: pd.DataFrame, same: np.ndarray) -> np.ndarray:
    """Which images of a class in a batch look like one picture, (N,) int64: those with the same number do.

    Images look alike if they are the same picture, directly or through other images of any batch; or if they have the
    same perceptual hash, so that a class of photographs that hardly differ is found too.

    Args:
        rows: as given to `find_duplicates`, with the columns arrival and class_name.
        same: as `find_duplicates` returns it.
    """
    arrival = rows["arrival"].to_numpy(np.int64)
    class_name, classes = pd.factorize(rows["class_name"])
    group = arrival * max(len(classes), 1) + class_name
    code, codes = pd.factorize(rows["hash"].to_numpy())
    _, first, member = np.unique(group * max(len(codes), 1) + code, return_index=True, return_inverse=True)
    above, below = same.T
    # An image of an earlier batch stands in the graph once for each later batch, apart from itself: otherwise a later
    # batch could join what was apart in an earlier one, and change what was said of that.
    earlier = arrival[above] != arrival[below]
    stand_ins, stand_in = np.unique(
        np.stack([above[earlier], arrival[below[earlier]]], axis=1), axis=0, return_inverse=True
    )
    above = above.copy()
    above[earlier] = len(rows) + stand_in
    one, other = np.concatenate([above, first[member]]), np.concatenate([below, np.arange(len(rows))])
    size = len(rows) + len(stand_ins)
    graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(size, size))
    count, picture = connected_components(graph, directed=False)
    _, number = np.unique(group * max(count, 1) + picture[: len(rows)], return_inverse=True)
    return number.astype(np.int64)


def _near_duplicates(
    rows: pd.DataFrame, distinct: np.ndarray, limits: Validate, same_picture: SamePicture
) -> np.ndarray:
    """The pairs (P, 2) that pixels confirm."""
    if limits.near_duplicate_distance is None:
        return np.empty((0, 2), dtype=np.int64)
    looks = rows[["hash", "brightness", "contrast"]].iloc[distinct]
    upper, lower = (
        distinct[side] for side in near_pairs(looks, limits.near_duplicate_distance, limits.near_duplicate_difference)
    )
    return np.stack([upper, lower], axis=1)[same_picture(upper, lower)]


def near_pairs(looks: pd.DataFrame, distance: int, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images that may be the same picture, found without comparing all pairs.

    These are all pairs whose hashes are within `distance` bits and whose brightness and contrast agree to `difference`:
    the mean absolute difference of two images is at least the difference of their means. A hash with almost all bits
    alike is plain: a small object on an even background. Thousands of different images may share it, so two plain ones
    must agree to `PLAIN_BRIGHTNESS` and `PLAIN_CONTRAST`.

    Args:
        looks: columns hash (uint64), brightness, contrast (0-255).
        distance: in bits.
        difference: in levels of luminance (0-255).

    Returns:
        Positions (P,) and (P,), int64, the smaller one first, sorted.

    Raises:
        StageError: there are more than `MAX_PAIRS`, or too many to compare.
    """
    look = Appearance(*(looks[name].to_numpy(kind) for name, kind in _COLUMNS))
    found = [np.empty((0, 2), np.int64)]
    structured = _structured_pairs(look, distance, difference + SCALING_SLACK)
    for pairs in chain(_plain_pairs(look, distance), structured):
        found.append(pairs)
        _check_budget(sum(map(len, found)), MAX_PAIRS, distance)
    pairs = np.sort(np.concatenate(found), axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[:, 0], pairs[:, 1]


_COLUMNS = (("hash", np.uint64), ("brightness", np.float64), ("contrast", np.float64))


class Appearance(NamedTuple):
    """Columns of the facts, (N,) each."""

    hash: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray


def _check_budget(count: int, most: int, distance: int) -> None:
    if count > most:
        raise _too_many(most, distance)


def _too_many(most: int, distance: int) -> StageError:
    return StageError(
        f"more than {most:,} pairs of images have almost the same perceptual hash: it does not tell these images "
        f"apart; set validate.near_duplicate_distance below {distance}, or to null"
    )


def is_plain(hashes: np.ndarray) -> np.ndarray:
    """Whether almost all bits of a hash are alike, (N,) bool."""
    bits_set = np.bitwise_count(hashes).astype(np.int64)
    return np.minimum(bits_set, BITS - bits_set) <= PLAIN_BITS


def _plain_pairs(look: Appearance, distance: int) -> Iterator[np.ndarray]:
    """Pairs (P, 2) of rows that are both plain: neighbours in brightness, then checked for contrast and hash."""
    plain = np.flatnonzero(is_plain(look.hash))
    plain = plain[np.argsort(look.brightness[plain], kind="stable")]
    brightness = look.brightness[plain]
    ends = np.searchsorted(brightness, brightness + PLAIN_BRIGHTNESS, side="right")
    after = np.arange(1, len(plain) + 1)
    _check_budget(int((ends - after).sum()), MAX_COMPARISONS, distance)
    for part in _chunks(ends - after):
        matches, query = _ranges(after[part], (ends - after)[part])
        one, other = plain[part][query], plain[matches]
        keep = np.abs(look.contrast[one] - look.contrast[other]) <= PLAIN_CONTRAST
        keep[keep] = np.bitwise_count(look.hash[one[keep]] ^ look.hash[other[keep]]) <= distance
        yield np.stack([one[keep], other[keep]], axis=1)


def _structured_pairs(look: Appearance, distance: int, tolerance: float) -> Iterator[np.ndarray]:
    """Pairs (P, 2) of rows that are not both plain: near hashes, then a window of brightness in each."""
    values, group = np.unique(look.hash, return_inverse=True)
    by_group = np.lexsort((look.brightness, group))
    # One ascending number for (hash, brightness): brightness is below 256, so hashes are 1024 apart.
    place = group[by_group] * 1024.0 + look.brightness[by_group]
    starts = np.searchsorted(group[by_group], np.arange(len(values) + 1))
    sizes = np.diff(starts)
    itself = np.flatnonzero((sizes > 1) & ~is_plain(values))
    try:
        near, nearby = pairs_within(values, distance, ignored=is_plain(values), workers=worker_count())
    except TooManyCandidatesError:
        raise _too_many(MAX_CANDIDATES, distance) from None
    left, right = np.concatenate([itself, near]), np.concatenate([itself, nearby])
    for some in _chunks(sizes[left]):
        queries, pair = _ranges(starts[left[some]], sizes[left[some]])
        sought = right[some][pair] * 1024.0 + look.brightness[by_group[queries]]
        low = np.searchsorted(place, sought - tolerance, side="left")
        high = np.searchsorted(place, sought + tolerance, side="right")
        for part in _chunks(high - low):
            matches, query = _ranges(low[part], (high - low)[part])
            one, other = by_group[queries[part][query]], by_group[matches]
            keep = np.abs(look.contrast[one] - look.contrast[other]) <= tolerance
            # Within one hash each pair comes twice, and each image with itself: keep one.
            keep &= (one < other) | (group[one] != group[other])
            yield np.stack([one[keep], other[keep]], axis=1)


def _chunks(sizes: np.ndarray) -> Iterator[slice]:
    """Slices of consecutive items whose sizes add up to about `CHUNK`, so that memory stays bounded."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        done = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, done + CHUNK, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of the ranges [start, start + size), and for each the number of its range."""
    number = np.repeat(np.arange(len(sizes)), sizes)
    before = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return starts[number] + np.arange(len(number)) - before, number
