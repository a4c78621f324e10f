"""Exact and near-duplicates without comparing all pairs: by sha256, and by perceptual hash, confirmed on pixels
(same_picture.py)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations
from math import comb
from typing import NamedTuple

import numpy as np
import pandas as pd

from stages.params.validate import Validate
from stages.runtime.command import StageError
from stages.runtime.progress import worker_count

BITS = 64
# Brightness in the facts is of another scale of the image than the thumbnails are: it may differ by so much more.
SCALING_SLACK = 2.0
# A hash is plain with at most so many odd bits; two plain images must agree more closely in brightness and contrast.
PLAIN_BITS = 8
PLAIN_BRIGHTNESS = 6.0
PLAIN_CONTRAST = 2.0
# Budgets: beyond these, hashes do not tell the images apart at all. ImageNet needs a hundredth.
MAX_PAIRS = 20_000_000  # to confirm on pixels
MAX_COMPARISONS = 20_000_000_000  # of hashes
CHUNK = 2_000_000

SamePicture = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Positions of two images, (P,) and (P,) → whether they are the same picture on pixels, (P,) bool."""


class Duplicates(NamedTuple):
    """Per image: position of the image that it yields to (-1: it stays), and whether the bytes are the same.

    `same` are pairs (P, 2) of positions that are the same picture, enough to lead from each to all that it is like.
    """

    yields_to: np.ndarray
    exact: np.ndarray
    same: np.ndarray


def find_duplicates(rows: pd.DataFrame, limits: Validate, same_picture: SamePicture) -> Duplicates:
    """Walks down `rows` and lets each image yield to the first one above it that stays and is the same.

    What happens to a row depends on the rows above it alone, so more rows below never change it.

    Args:
        rows: images in order of precedence, columns sha256, hash, brightness, contrast.
        limits: what counts as near.
        same_picture: confirms hash matches on pixels; never asked about images with the same bytes.
    """
    codes, _ = pd.factorize(rows["sha256"])
    _, first = np.unique(codes, return_index=True)
    original = first[codes]  # factorize numbers by first appearance, so this is the topmost row with these bytes
    distinct = np.flatnonzero(original == np.arange(len(rows)))
    yields_to, near = _near_duplicates(rows, distinct, limits, same_picture)
    copy = original != np.arange(len(rows))
    original_yields = yields_to[original] >= 0
    exact = copy & ~original_yields
    yields_to[copy] = np.where(original_yields, yields_to[original], original)[copy]
    same = np.concatenate([near, np.stack([original[copy], np.flatnonzero(copy)], axis=1)])
    return Duplicates(yields_to, exact, same)


def look_alikes(rows: pd.DataFrame, same: np.ndarray) -> np.ndarray:
    """Which images of a class in a batch look like one picture, (N,) int64: the same number, the same look.

    Alike are images that are the same picture, also by way of others, wherever these are; and images with the same
    perceptual hash, so that different photographs count too where a class has hardly two that differ.

    Args:
        rows: as given to `find_duplicates`, with the columns arrival and class_name.
        same: as it answers.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

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
) -> tuple[np.ndarray, np.ndarray]:
    """Position of the image that each yields to, (N,); and the pairs (P, 2) that pixels confirm."""
    yields_to = np.full(len(rows), -1, dtype=np.int64)
    if limits.near_duplicate_distance is None:
        return yields_to, np.empty((0, 2), dtype=np.int64)
    looks = rows[["hash", "brightness", "contrast"]].iloc[distinct]
    upper, lower = (
        distinct[side] for side in near_pairs(looks, limits.near_duplicate_distance, limits.near_duplicate_difference)
    )
    same = same_picture(upper, lower)
    upper, lower = upper[same], lower[same]
    by_row = np.lexsort((upper, lower))
    for above, below in zip(upper[by_row].tolist(), lower[by_row].tolist(), strict=True):
        if yields_to[below] < 0 and yields_to[above] < 0:
            yields_to[below] = above
    return yields_to, np.stack([upper, lower], axis=1)


def near_pairs(looks: pd.DataFrame, distance: int, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images that may be the same picture, found without comparing all pairs.

    These are all pairs whose hashes are within `distance` bits and whose brightness and contrast agree to `difference`
    (two images further apart in mean brightness cannot be within a mean absolute difference of it). A hash with almost
    all bits alike is plain: a small thing on an even ground. Thousands of different images may share it, so two plain
    ones must agree to `PLAIN_BRIGHTNESS` and `PLAIN_CONTRAST`.

    Args:
        looks: columns hash (uint64), brightness, contrast (0-255).
        distance: in bits.
        difference: in levels of luminance (0-255).

    Returns:
        Positions (P,) and (P,), int64, the smaller one first, sorted.

    Raises:
        StageError: more than `MAX_PAIRS`, or as many that have to be looked at to know.
    """
    look = Looks(*(looks[name].to_numpy(kind) for name, kind in _LOOKS))
    found = [np.empty((0, 2), np.int64)]
    structured = _structured_pairs(look, distance, difference + SCALING_SLACK)
    for pairs in chain(_plain_pairs(look, distance), structured):
        found.append(pairs)
        _check_budget(sum(map(len, found)), MAX_PAIRS, distance)
    pairs = np.sort(np.concatenate(found), axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[:, 0], pairs[:, 1]


_LOOKS = (("hash", np.uint64), ("brightness", np.float64), ("contrast", np.float64))


class Looks(NamedTuple):
    """Columns of the facts, (N,) each."""

    hash: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray


def _check_budget(count: int, most: int, distance: int) -> None:
    if count > most:
        raise StageError(
            f"more than {most:,} pairs of images have almost the same perceptual hash: it does not tell these images "
            f"apart; set validate.near_duplicate_distance below {distance}, or to null"
        )


def is_plain(hashes: np.ndarray) -> np.ndarray:
    """Whether almost all bits of a hash are alike, (N,) bool."""
    bits_set = np.bitwise_count(hashes).astype(np.int64)
    return np.minimum(bits_set, BITS - bits_set) <= PLAIN_BITS


def _plain_pairs(look: Looks, distance: int) -> Iterator[np.ndarray]:
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


def _structured_pairs(look: Looks, distance: int, tolerance: float) -> Iterator[np.ndarray]:
    """Pairs (P, 2) of rows of which one at least is not plain: close hashes, then windows in brightness within each."""
    values, group = np.unique(look.hash, return_inverse=True)
    by_group = np.lexsort((look.brightness, group))
    # One ascending number for (hash, brightness): brightness is below 256, so hashes are 1024 apart.
    place = group[by_group] * 1024.0 + look.brightness[by_group]
    starts = np.searchsorted(group[by_group], np.arange(len(values) + 1))
    sizes = np.diff(starts)
    itself = np.flatnonzero((sizes > 1) & ~is_plain(values))
    near, nearby = _close_values(values, distance)
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
            # Within one hash both see each other: keep one of the two, and nobody with itself.
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
    """All members of the ranges [start, start + size), and the number of the range that each is from."""
    number = np.repeat(np.arange(len(sizes)), sizes)
    before = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return starts[number] + np.arange(len(number)) - before, number


class Held(NamedTuple):
    """What a table looks at: pairs of hashes that agree on `blocks` (bit masks) and differ in each of `changed`, the
    other blocks in front of the last of these. So each pair is in one table alone, that of its first intact blocks."""

    blocks: tuple[int, ...]
    changed: tuple[int, ...]


def _close_values(values: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i < j) of distinct hashes within `distance` bits, not both plain, by the pigeonhole principle.

    The bits are dealt into `distance + intact` blocks; `distance` changed bits leave at least `intact` blocks alone.
    So for every choice of `intact` blocks, only hashes that agree on all of these are compared (cf. Norouzi, Punjani &
    Fleet 2012, "Fast search in Hamming space with multi-index hashing").
    """
    count, plain = len(values), is_plain(values)
    if distance == 0 or count < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)

    def table(held: Held) -> tuple[np.ndarray, int]:
        return _close_in_table(values, plain, held, distance)

    tables = list(_tables(distance, _intact_blocks(count, distance)))
    pairs, compared = [np.empty((0, 2), np.int64)], 0
    with ThreadPoolExecutor(worker_count()) as pool:  # sorting and comparing let go of the interpreter's lock
        step = worker_count()  # no more ahead than can run, so that an exceeded budget ends it at once
        for start in range(0, len(tables), step):
            for found, looked_at in pool.map(table, tables[start : start + step]):
                compared += looked_at
                _check_budget(compared, MAX_COMPARISONS, distance)
                pairs.append(found)
    one, other = np.concatenate(pairs).T
    return np.minimum(one, other), np.maximum(one, other)


def _close_in_table(values: np.ndarray, plain: np.ndarray, held: Held, distance: int) -> tuple[np.ndarray, int]:
    """Pairs (P, 2) of hashes that agree on what is held and are left to this table; how many pairs were looked at."""
    mask = sum(held.blocks)
    # A bit that the mask leaves out is turned to the very end: there it puts plain ones first among equal keys.
    free = (~mask & -~mask).bit_length() - 1
    key = _rotated_right(values & np.uint64(mask), free)
    order = np.argsort(np.where(plain, key, key | np.uint64(1)))
    key, structured, ordered = key[order], ~plain[order], values[order]
    pairs, compared = [np.empty((0, 2), np.int64)], 0
    for one, other in _neighbours(key, structured):
        compared += len(one)
        _check_budget(compared, MAX_COMPARISONS, distance)
        changed = ordered[one] ^ ordered[other]
        near = np.bitwise_count(changed) <= distance
        one, other, changed = one[near], other[near], changed[near]
        mine = np.ones(len(one), dtype=bool)
        for block in held.changed:
            mine &= (changed & np.uint64(block)) != 0
        pairs.append(np.stack([order[one[mine]], order[other[mine]]], axis=1))
    return np.concatenate(pairs), compared


def _rotated_right(values: np.ndarray, by: int) -> np.ndarray:
    return (values >> np.uint64(by)) | (values << np.uint64(BITS - by)) if by else values


def _neighbours(key: np.ndarray, structured: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions in each run of equal keys of which the second at least is structured: neighbours, then next
    but one, and so on. In a run the plain ones come first."""
    alive, step = np.flatnonzero(structured), 1
    while True:
        alive = alive[alive >= step]
        alive = alive[key[alive] == key[alive - step]]
        if not alive.size:
            return
        yield alive - step, alive
        step += 1


def _intact_blocks(count: int, distance: int) -> int:
    """How many blocks to hold fixed: sorting a table costs `count`, comparing the pairs that share a key by chance.

    Real hashes are not uniform: the pairs are reckoned as if only 0.7 of the bits were free.
    """

    def cost(intact: int) -> float:
        tables, bits = comb(distance + intact, intact), 0.7 * BITS * intact / (distance + intact)
        return tables * (20.0 * count + count * count / 2 / 2**bits)

    return min(range(1, 6), key=cost)


def _tables(distance: int, intact: int) -> Iterator[Held]:
    """Every choice of `intact` blocks. A block is every n-th bit: neighbouring bits are correlated."""
    blocks = distance + intact
    masks = [sum(1 << bit for bit in range(block, BITS, blocks)) for block in range(blocks)]
    for chosen in combinations(range(blocks), intact):
        changed = (mask for block, mask in enumerate(masks[: chosen[-1]]) if block not in chosen)
        yield Held(tuple(masks[block] for block in chosen), tuple(changed))
