"""Whether two images that look alike as thumbnails are one picture coded twice, or one scene with another object.

Coding, resizing and brightening change a picture a little everywhere, or along edges. Another object changes it much
in one place; another exposure has grain of its own, while a copy has the original's or none.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from stages.runtime.progress import progress, worker_count

SIDE = 128
"""Of the pictures compared, in pixels: those of smaller images are 64, 32, 16 or 8 wide, each pixel repeated."""
DECODED = 256
"""JPEGs are decoded at a scale with both sides at least this long: averaging that agrees better with other resizing."""
CELL = 4  # side of a place, in pixels
EDGES = 1.5
"""Levels more that may differ for each level of detail (standard deviation) in a place: resizing shifts edges."""
MOST = 3.0
"""The most that may differ, however much detail there is, as a multiple of `near_duplicate_local`."""
PEAK, PEAK_BASE = 1.4, 4.0
"""The largest difference of 2 x 2 pixels, as a share of `PEAK_BASE` levels and `EDGES` of detail, may be as many times
that of all but 5 % of them as `near_duplicate_local` times this: what is nowhere else is no coding."""
LEAST_PEAK = 0.1
"""Below this share of a difference nothing is counted: a picture without any noise differs in one place only."""
CLIPPED = 8, 247
"""Levels near black and white, which say nothing of brightness and contrast: a copy may be cut off there."""
GRAIN = 0.25
"""Variance of a place from which on it has detail; rounding alone makes a twelfth."""
SHARED = 0.5
"""Two exposures share less of their detail. Of recoded photographs each shares at least 0.81 with the original, of
photographs of one part under one camera, with noise of 4 levels at 256 pixels, at most 0.12."""
FEW = 16  # places with detail; fewer say nothing
PAIRS_AT_ONCE = 32
STEPS = 16.0
"""Fitted levels are rounded to this part of one, so that all sums are exact in whatever order a machine adds."""


def picture_sides(rows: pd.DataFrame) -> np.ndarray:
    """Width in pixels of the picture of each image, (N,): the largest power of 2 from 8 to `SIDE` that is not larger
    than its shorter side; columns width and height."""
    shorter = np.clip(rows[["width", "height"]].min(axis=1).to_numpy(np.int64), 8, SIDE)
    return 2 ** np.floor(np.log2(shorter)).astype(np.int64)


def same_locally(pictures: np.ndarray, sides: np.ndarray, pairs: np.ndarray, limit: float) -> np.ndarray:
    """Whether pairs of pictures, once brightness and contrast fit, agree in every place and share detail, (P,) bool.

    Args:
        pictures: (N, SIDE, SIDE) uint8, of which the smaller ones repeat their pixels.
        sides: of each, (N,).
        pairs: positions in `pictures`, (P, 2).
        limit: `near_duplicate_local`.
    """
    same = np.zeros(len(pairs), dtype=bool)
    common = sides[pairs].min(axis=1)

    def judge(some: np.ndarray) -> None:
        side = int(common[some[0]])
        one, other = (_shrunk(pictures[pairs[some, column]], side) for column in (0, 1))
        same[some] = _agree(one, other, limit)

    of_side = [np.flatnonzero(common == side) for side in np.unique(common)]
    parts = [some[start : start + PAIRS_AT_ONCE] for some in of_side for start in range(0, len(some), PAIRS_AT_ONCE)]
    with ThreadPoolExecutor(worker_count()) as pool:  # array operations let go of the interpreter's lock
        for _ in progress(pool.map(judge, parts), len(parts), "comparing places"):
            pass
    return same


def _shrunk(pictures: np.ndarray, side: int) -> np.ndarray:
    """(P, side, side) float64; means of whole numbers over a power of 2, so they are exact."""
    return _means(pictures.astype(np.float64), pictures.shape[1] // side)


def _means(pixels: np.ndarray, by: int) -> np.ndarray:
    """(P, side, side) -> (P, side / by, side / by): means of `by` x `by` pixels, by a power of 2."""
    while by > 1:
        rows = pixels[:, ::2] + pixels[:, 1::2]
        pixels, by = (rows[:, :, ::2] + rows[:, :, 1::2]) / 4, by // 2
    return pixels


def _agree(one: np.ndarray, other: np.ndarray, limit: float) -> np.ndarray:
    same = _shared_detail(one, other) >= SHARED  # the cheaper question first
    if not same.any():
        return same
    one, other = one[same], other[same]
    gain, offset = _fit(one, other)
    forth, back = (
        np.round(fitted * STEPS) / STEPS for fitted in (gain * one + offset, (other - offset) / np.maximum(gain, 1e-6))
    )
    # What one of them cut off at black or white the other may still have, so one of both directions is enough.
    near = np.zeros(len(one), dtype=bool)
    for fitted, with_it in ((forth, other), (back, one)):
        fitted = np.clip(fitted, 0, 255)
        detail = np.minimum(_detail(fitted), _detail(with_it))
        difference = fitted - with_it
        near |= (_worst_place(difference, detail, limit) <= 1) & (_peak(difference, detail) <= PEAK * limit)
    same[same] = near
    return same


def _fit(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset (P, 1, 1) that give `one` mean and contrast of `other`, by pixels that are not cut off."""
    low, high = CLIPPED
    valid = (one > low) & (one < high) & (other > low) & (other < high)
    valid |= valid.mean(axis=(1, 2), keepdims=True) < 1 / 8
    count = valid.sum(axis=(1, 2))
    sums = [(pixels * valid).sum(axis=(1, 2)) for pixels in (one, other)]
    squares = [(pixels * pixels * valid).sum(axis=(1, 2)) for pixels in (one, other)]
    spread = [np.sqrt(count * square - total * total) for total, square in zip(sums, squares, strict=True)]
    gain = np.divide(spread[1], spread[0], out=np.ones(len(one)), where=spread[0] > 0)
    offset = (sums[1] - gain * sums[0]) / count
    return gain[:, None, None], offset[:, None, None]


def _detail(pixels: np.ndarray) -> np.ndarray:
    """Standard deviation in each place, (P, side / CELL, side / CELL)."""
    means = _means(pixels, CELL)
    return np.sqrt(np.maximum(_means(pixels * pixels, CELL) - means * means, 0))


def _worst_place(difference: np.ndarray, detail: np.ndarray, limit: float) -> np.ndarray:
    """The largest mean difference of a place, as a share of what may differ there, (P,)."""
    allowed = np.minimum(limit + EDGES * detail, MOST * limit)
    return (np.abs(_means(difference, CELL)) / allowed).max(axis=(1, 2))


def _peak(difference: np.ndarray, detail: np.ndarray) -> np.ndarray:
    """How far the largest difference of 2 x 2 pixels stands out from the rest, (P,)."""
    allowed = (PEAK_BASE + EDGES * detail).repeat(CELL // 2, axis=1).repeat(CELL // 2, axis=2)
    shares = (np.abs(_means(difference, 2)) / allowed).reshape(len(difference), -1)
    most = shares.shape[1] * 19 // 20
    return shares.max(axis=1) / np.maximum(np.partition(shares, most, axis=1)[:, most], LEAST_PEAK)


def _shared_detail(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much of the detail of the smoother picture the other one has too, (P,): the median of all places with detail.

    The covariance of the pixels of a place over the smaller of both variances, contrast fitted: near 1 where one is a
    copy that lost detail, near 0 where each has its own.
    """
    means = [_means(pixels, CELL) for pixels in (one, other)]
    variances = [_means(pixels * pixels, CELL) - mean * mean for pixels, mean in zip((one, other), means, strict=True)]
    covariance = _means(one * other, CELL) - means[0] * means[1]
    spread = [np.sqrt(_spread(pixels))[:, None, None] for pixels in (one, other)]
    gain = np.divide(spread[0], spread[1], out=np.ones_like(spread[0]), where=spread[1] > 0)
    smaller = np.minimum(variances[0], variances[1] * gain * gain)
    detailed = smaller > GRAIN
    share = np.divide(covariance * gain, smaller, out=np.full(smaller.shape, np.inf), where=detailed)
    count = detailed.sum(axis=(1, 2))
    ranked = np.sort(share.reshape(len(one), -1), axis=1)
    median = ranked[np.arange(len(one)), np.maximum(count - 1, 0) // 2]
    return np.where(count >= FEW, median, 1.0)


def _spread(pixels: np.ndarray) -> np.ndarray:
    """The variance of each picture, (P,), from exact sums."""
    count = pixels[0].size
    total = pixels.sum(axis=(1, 2))
    return (count * (pixels * pixels).sum(axis=(1, 2)) - total * total) / count**2
