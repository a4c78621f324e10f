"""Whether two images that look alike as thumbnails are one picture coded twice, or one scene with another object.

Coding, resizing and brightening change a picture a little everywhere, or along edges. Another object changes it much
in one place; another exposure has grain of its own, while a copy has the original's or none.
"""

import numpy as np
import pandas as pd

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
PAIRS_AT_ONCE = 64
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
    for side in np.unique(common).tolist():
        (of_side,) = np.nonzero(common == side)
        for start in range(0, len(of_side), PAIRS_AT_ONCE):
            some = of_side[start : start + PAIRS_AT_ONCE]
            one, other = (_shrunk(pictures[pairs[some, column]], side) for column in (0, 1))
            same[some] = _agree(one, other, limit)
    return same


def _shrunk(pictures: np.ndarray, side: int) -> np.ndarray:
    """(P, side, side) float64; means of whole numbers over a power of 2, so they are exact."""
    factor = pictures.shape[1] // side
    return pictures.reshape(len(pictures), side, factor, side, factor).mean(axis=(2, 4))


def _agree(one: np.ndarray, other: np.ndarray, limit: float) -> np.ndarray:
    gain, offset = _fit(one, other)
    forth, back = (
        np.round(fitted * STEPS) / STEPS for fitted in (gain * one + offset, (other - offset) / np.maximum(gain, 1e-6))
    )
    # What one of them cut off at black or white the other may still have, so one of both directions is enough.
    near = [
        (_worst_place(np.clip(fitted, 0, 255), with_it, limit) <= 1)
        & (_peak(np.clip(fitted, 0, 255), with_it) <= PEAK * limit)
        for fitted, with_it in ((forth, other), (back, one))
    ]
    return (near[0] | near[1]) & (_shared_detail(one, back) >= SHARED)


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


def _places(pixels: np.ndarray) -> np.ndarray:
    """(P, places, CELL * CELL)."""
    count, cells = len(pixels), pixels.shape[1] // CELL
    grid = pixels.reshape(count, cells, CELL, cells, CELL).swapaxes(2, 3)
    return grid.reshape(count, cells * cells, CELL * CELL)


def _worst_place(one: np.ndarray, other: np.ndarray, limit: float) -> np.ndarray:
    """The largest difference of the means of a place, as a share of what may differ there, (P,)."""
    allowed = limit + EDGES * _common_detail(one, other)
    difference = np.abs(_places(one).mean(axis=2) - _places(other).mean(axis=2))
    return (difference / np.maximum(np.minimum(allowed, MOST * limit), 1e-6)).max(axis=1)


def _peak(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far the largest difference of 2 x 2 pixels stands out from the rest, (P,)."""
    count, half = len(one), one.shape[1] // 2
    differences = np.abs((one - other).reshape(count, half, 2, half, 2).mean(axis=(2, 4)))
    detail = _common_detail(one, other).reshape(count, half // 2, half // 2).repeat(2, axis=1).repeat(2, axis=2)
    shares = np.sort((differences / (PEAK_BASE + EDGES * detail)).reshape(count, -1), axis=1)
    return shares[:, -1] / np.maximum(shares[:, shares.shape[1] * 19 // 20], LEAST_PEAK)


def _common_detail(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Standard deviation in each place of the smoother of both pictures, (P, places)."""
    variances = []
    for place in (_places(one), _places(other)):
        mean = place.mean(axis=2)
        variances.append(np.maximum((place * place).mean(axis=2) - mean * mean, 0))
    return np.sqrt(np.minimum(*variances))


def _shared_detail(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much of the detail of the smoother picture the other one has too, (P,): the median of all places with detail.

    The covariance of the pixels of a place over the smaller of both variances: near 1 where one is a copy that lost
    detail, near 0 where each has its own.
    """
    places = [place - place.mean(axis=2, keepdims=True) for place in (_places(one), _places(other))]
    covariance = (places[0] * places[1]).mean(axis=2)
    smaller = np.minimum(*((place * place).mean(axis=2) for place in places))
    detailed = smaller > GRAIN
    share = np.divide(covariance, smaller, out=np.full(smaller.shape, np.nan), where=detailed)
    enough = detailed.sum(axis=1) >= FEW
    shared = np.ones(len(one))
    if enough.any():
        shared[enough] = np.nanmedian(share[enough], axis=1)
    return shared
