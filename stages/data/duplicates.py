"""Exact and near-duplicates without comparing all pairs: by sha256, and by perceptual hash confirmed on pixels."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from stages.command import StageError
from stages.data.images import decode_strictly, read_header
from stages.params.validate import Validate
from stages.progress import worker_count

THUMBNAIL = 32  # side of the luminance thumbnails that confirm a hash match, in pixels
BITS = 64
# Brightness in the facts is of another scale of the image than the thumbnails are: it may differ by so much more.
SCALING_SLACK = 2.0
# Both hashes say next to nothing (a small thing on a plain ground): brightness and contrast must then agree to this.
PLAIN_TOLERANCE = 1.0
# Pairs to confirm on pixels; beyond it, hashes do not tell these images apart at all.
MAX_PAIRS = 10_000_000
CHUNK = 2_000_000

SamePicture = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Positions of two images, (P,) and (P,) → whether they are the same picture on pixels, (P,) bool."""


class Duplicates(NamedTuple):
    """Per image: position of the image that it yields to (-1: it stays), and whether the bytes are the same."""

    yields_to: np.ndarray
    exact: np.ndarray


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
    yields_to = _near_duplicates(rows, distinct, limits, same_picture)
    copy = original != np.arange(len(rows))
    original_yields = yields_to[original] >= 0
    exact = copy & ~original_yields
    yields_to[copy] = np.where(original_yields, yields_to[original], original)[copy]
    return Duplicates(yields_to, exact)


def _near_duplicates(
    rows: pd.DataFrame, distinct: np.ndarray, limits: Validate, same_picture: SamePicture
) -> np.ndarray:
    yields_to = np.full(len(rows), -1, dtype=np.int64)
    if limits.near_duplicate_distance is None:
        return yields_to
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
    return yields_to


def near_pairs(looks: pd.DataFrame, distance: int, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images that may be the same picture.

    These are all pairs whose hashes are within `distance` bits and whose brightness and contrast agree to `difference`
    (two images further apart in mean brightness cannot be within a mean absolute difference of it). Hashes with at most
    `distance` bits set, or unset, hold no structure; two such images must agree to `PLAIN_TOLERANCE`.

    Args:
        looks: columns hash (uint64), brightness, contrast (0-255).
        distance: in bits.
        difference: in levels of luminance (0-255).

    Returns:
        Positions (P,) and (P,), int64, the smaller one first, sorted.

    Raises:
        StageError: more than `MAX_PAIRS`.
    """
    values, group = np.unique(looks["hash"].to_numpy(np.uint64), return_inverse=True)
    bits_set = np.bitwise_count(values).astype(np.int64)
    plain = np.minimum(bits_set, BITS - bits_set) <= distance
    found: list[np.ndarray] = []
    total = 0
    for pairs in _same_brightness(looks, values, group, plain, distance, difference + SCALING_SLACK):
        found.append(pairs)
        total += len(pairs)
        if total > MAX_PAIRS:
            raise StageError(
                f"more than {MAX_PAIRS:,} pairs of images have almost the same perceptual hash: it does not tell them "
                f"apart; set validate.near_duplicate_distance below {distance}, or to null"
            )
    pairs = np.concatenate(found) if found else np.empty((0, 2), np.int64)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[:, 0], pairs[:, 1]


def _same_brightness(
    looks: pd.DataFrame, values: np.ndarray, group: np.ndarray, plain: np.ndarray, distance: int, tolerance: float
) -> Iterator[np.ndarray]:
    """Pairs (P, 2) of rows with close hashes, found by windows in brightness within each hash value."""
    brightness, contrast = (looks[name].to_numpy(np.float64) for name in ("brightness", "contrast"))
    by_group = np.lexsort((brightness, group))
    # One ascending number for (hash value, brightness): brightness is below 256, so values are 1024 apart.
    place = group[by_group] * 1024.0 + brightness[by_group]
    starts = np.searchsorted(group[by_group], np.arange(len(values) + 1))
    sizes = np.diff(starts)
    itself = np.flatnonzero(sizes > 1)
    near, nearby = _close_values(values, distance)
    left, right = np.concatenate([itself, near]), np.concatenate([itself, nearby])
    window = np.where(plain[left] & plain[right], PLAIN_TOLERANCE, tolerance)
    for some in _chunks(sizes[left]):
        queries, pair = _ranges(starts[left[some]], sizes[left[some]])
        target, reach = right[some][pair], window[some][pair]
        seen = brightness[by_group[queries]]
        low = np.searchsorted(place, target * 1024.0 + seen - reach, side="left")
        high = np.searchsorted(place, target * 1024.0 + seen + reach, side="right")
        for part in _chunks(high - low):
            matches, query = _ranges(low[part], (high - low)[part])
            one, other = by_group[queries[part][query]], by_group[matches]
            # Both ends of a window within one value see each other: keep one of the two, and nobody with itself.
            keep = np.abs(contrast[one] - contrast[other]) <= reach[part][query]
            keep &= (one < other) | (group[one] != group[other])
            yield np.stack([np.minimum(one, other)[keep], np.maximum(one, other)[keep]], axis=1)


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


def _close_values(values: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i < j) of distinct hashes within `distance` bits, by the pigeonhole principle.

    The bits are dealt into `distance + intact` blocks; `distance` changed bits leave at least `intact` blocks alone.
    So for every choice of `intact` blocks, only hashes that agree on all of these are compared (cf. Norouzi, Punjani &
    Fleet 2012, "Fast search in Hamming space with multi-index hashing").
    """
    count = len(values)
    codes = [np.empty(0, np.int64)]
    if distance > 0 and count > 1:
        for mask in _masks(distance, _intact_blocks(count, distance)):
            key = values & mask
            order = np.argsort(key)
            for one, other in _neighbours(key[order], values[order], distance):
                i, j = order[one], order[other]
                codes.append(np.minimum(i, j) * count + np.maximum(i, j))
    code = np.unique(np.concatenate(codes))
    return code // max(count, 1), code % max(count, 1)


def _neighbours(key: np.ndarray, values: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of pairs within `distance` bits in each run of equal keys: neighbours, then next but one, and so on."""
    alive, step = np.arange(len(key) - 1), 1
    while True:
        alive = alive[alive + step < len(key)]
        alive = alive[key[alive] == key[alive + step]]
        if not alive.size:
            return
        near = np.bitwise_count(values[alive] ^ values[alive + step]) <= distance
        yield alive[near], alive[near] + step
        step += 1


def _intact_blocks(count: int, distance: int) -> int:
    """How many blocks to hold fixed: sorting a table costs `count`, comparing the pairs that share a key by chance.

    Real hashes are not uniform: the pairs are reckoned as if only 0.7 of the bits were free.
    """

    def cost(intact: int) -> float:
        tables, bits = comb(distance + intact, intact), 0.7 * BITS * intact / (distance + intact)
        return tables * (20.0 * count + count * count / 2 / 2**bits)

    return min(range(1, 6), key=cost)


def _masks(distance: int, intact: int) -> Iterator[np.uint64]:
    """Bit masks of every choice of `intact` blocks. A block is every n-th bit: neighbouring bits are correlated."""
    blocks = distance + intact
    block_masks = [sum(1 << bit for bit in range(block, BITS, blocks)) for block in range(blocks)]
    for chosen in combinations(block_masks, intact):
        yield np.uint64(sum(chosen))


# ------------------------------------------------------------------------------------------------ on pixels


def pixel_confirmation(rows: pd.DataFrame, raw: Sequence[Path], limits: Validate) -> SamePicture:
    """A `SamePicture` that reads the images themselves.

    Args:
        rows: images as given to `find_duplicates`, columns tar, offset, bytes.
        raw: folder of the raw tars of each row.
        limits: when two thumbnails are the same picture.
    """

    def same_picture(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        wanted = np.unique(np.concatenate([left, right]))
        pictures = thumbnails(rows.iloc[wanted], [raw[position] for position in wanted])
        return same_thumbnails(pictures, np.searchsorted(wanted, left), np.searchsorted(wanted, right), limits)

    return same_picture


def same_thumbnails(pictures: np.ndarray, left: np.ndarray, right: np.ndarray, limits: Validate) -> np.ndarray:
    """Whether pairs of thumbnails are alike, (P,) bool: both in mean absolute difference and in correlation (Pearson).

    Args:
        pictures: (N, 1024) uint8.
        left: (P,), positions in `pictures`.
        right: (P,), positions in `pictures`.
        limits: `near_duplicate_difference` and `near_duplicate_correlation`.
    """
    same = np.zeros(len(left), dtype=bool)
    for start in range(0, len(left), 50_000):
        part = slice(start, start + 50_000)
        one, other = pictures[left[part]].astype(np.int64), pictures[right[part]].astype(np.int64)
        difference = np.abs(one - other).mean(axis=1)
        same[part] = (difference <= limits.near_duplicate_difference) & (
            _correlation(one, other) >= limits.near_duplicate_correlation
        )
    return same


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Row by row, from whole numbers, so that all machines agree; one of a single colour correlates with nothing."""
    count = one.shape[1]
    sums, squares = (one.sum(axis=1), other.sum(axis=1)), ((one * one).sum(axis=1), (other * other).sum(axis=1))
    covariance = count * (one * other).sum(axis=1) - sums[0] * sums[1]
    variances = [count * square - total * total for total, square in zip(sums, squares, strict=True)]
    scale = np.sqrt(variances[0].astype(np.float64)) * np.sqrt(variances[1].astype(np.float64))
    return np.divide(covariance, scale, out=np.zeros(len(one)), where=scale > 0)


def thumbnails(rows: pd.DataFrame, raw: Sequence[Path]) -> np.ndarray:
    """Luminance thumbnails, (N, 1024) uint8, of images in raw tars, read in the order of the tars.

    Args:
        rows: columns tar, offset, bytes.
        raw: folder of the raw tars of each row.

    Raises:
        StageError: a raw tar is gone, or does not hold what the facts say.
    """
    places = sorted(
        (folder / tar, int(offset), int(size), position)
        for position, (folder, tar, offset, size) in enumerate(
            zip(raw, rows["tar"], rows["offset"], rows["bytes"], strict=True)
        )
    )
    pictures = np.zeros((len(rows), THUMBNAIL * THUMBNAIL), dtype=np.uint8)
    with ThreadPoolExecutor(worker_count()) as pool:  # decoding lets go of the interpreter's lock
        for (*_, position), picture in zip(places, pool.map(_thumbnail, places), strict=True):
            pictures[position] = picture
    return pictures


def _thumbnail(place: tuple[Path, int, int, int]) -> np.ndarray:
    tar, offset, size, _ = place
    data = read_raw(tar, offset, size)
    try:
        luminance = decode_strictly(data, read_header(data))
    except ValueError as error:
        raise StageError(f"{tar} has changed since it was scanned ({error}); `dvc checkout` restores it") from error
    return np.asarray(Image.fromarray(luminance).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).reshape(-1)


def read_raw(tar: Path, offset: int, size: int) -> bytes:
    """Bytes of one image in a raw tar.

    Raises:
        StageError: the tar is not there.
    """
    try:
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except FileNotFoundError:
        raise StageError(f"{tar} is missing; `dvc pull` or `dvc repro ingest@{tar.parts[-3]}` brings it back") from None
