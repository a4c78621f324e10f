"""RandomResizedCrop (Szegedy et al. 2015, "Going Deeper with Convolutions"): which window of an image, and its pixels.

Windows are drawn here and not inside DALI, so that they depend on nothing but (seed, epoch, place in the epoch): any
batch of any epoch can be made without those before it, on any number of processes. On the CPU, OpenCV resizes the
window: DALI's own resizing costs twice as much as all decoding (docs/performance.md).
"""

from typing import Any, NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt

ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10
LARGEST_SMOOTHED = 3.0
"""Above this ratio of window to target, area averaging is cheaper than smoothing, and as good."""
LEAST_SMOOTHED = 1.2
"""Below this ratio a neighbour's weight would be less than 1 in 500."""
SMOOTHING = 5  # pixels; holds 98 % of the widest Gaussian that is used


class Windows(NamedTuple):
    """One window an image: `anchor` and `shape` (n, 2) int32 in pixels, rows first; `mirrored` (n,) bool."""

    anchor: npt.NDArray[np.int32]
    shape: npt.NDArray[np.int32]
    mirrored: npt.NDArray[np.bool_]


def random_draws(generator: np.random.Generator, count: int, min_area: float) -> npt.NDArray[np.float64]:
    """The random numbers that decide `count` windows, (count, 23): ten shares of the area in [min_area, 1), then ten
    aspects, row, column and flip in [0, 1).

    Apart from `windows`, because a batch's numbers are drawn for all processes, and each reads only its own images.
    """
    drawn = generator.random((count, 2 * ATTEMPTS + 3))
    drawn[:, :ATTEMPTS] = min_area + (1 - min_area) * drawn[:, :ATTEMPTS]
    return drawn


def windows(drawn: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]) -> Windows:
    """Windows of images: the first of ten tries that fits, else the largest one in the middle, as in torchvision.

    Args:
        drawn: (n, 23), of `random_draws`.
        sizes: (n, 2), height and width of each image in pixels.
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * drawn[:, :ATTEMPTS]
    low, high = np.log(ASPECT)
    aspect = np.exp(low + (high - low) * drawn[:, ATTEMPTS : 2 * ATTEMPTS])
    rows, columns = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (rows >= 1) & (columns >= 1) & (rows <= height) & (columns <= width)
    each, first = np.arange(len(sizes)), fits.argmax(axis=1)
    shape = np.stack([rows[each, first], columns[each, first]], axis=1)
    anchor = np.floor(drawn[:, -3:-1] * (sizes - shape + 1))
    (none,) = np.nonzero(~fits.any(axis=1))
    shape[none] = _largest(sizes[none])
    anchor[none] = (sizes[none] - shape[none]) // 2
    return Windows(anchor.astype(np.int32), shape.astype(np.int32), drawn[:, -1] < 0.5)


def _largest(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The largest window of an allowed aspect, for images that are narrower or wider than every allowed aspect."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    rows = np.minimum(height, np.maximum(1, np.rint(width / ASPECT[0])))
    columns = np.minimum(width, np.maximum(1, np.rint(height * ASPECT[1])))
    return np.stack([rows, columns], axis=1)


def resize(window: npt.NDArray[np.uint8], mirrored: bool, out: npt.NDArray[np.uint8]) -> None:
    """Writes the window into `out`, (side, side, 3) uint8, by antialiased bilinear sampling; mirrored if asked.

    A window is smoothed before it is made smaller. Sampling with a triangle as wide as the reduction (what PIL and
    torchvision do) is close to a Gaussian followed by bilinear sampling; a triangle of half width r has the variance
    r²/6, so the Gaussian's is (r² - 1)/6. On ImageNet the result is within 40 to 50 dB of PIL's, at half the cost of
    area averaging.
    """
    side = out.shape[0]
    ratios = [max(length / side, 1.0) for length in window.shape[1::-1]]
    pixels, method = cast(Any, window), cv2.INTER_LINEAR
    if max(ratios) > LARGEST_SMOOTHED:
        method = cv2.INTER_AREA
    elif max(ratios) > LEAST_SMOOTHED:
        # 0 would mean "as the other axis"; this little changes nothing.
        x, y = (max((ratio**2 - 1) / 6, 1e-4) ** 0.5 for ratio in ratios)
        pixels = cv2.GaussianBlur(pixels, (SMOOTHING, SMOOTHING), x, sigmaY=y, borderType=cv2.BORDER_REPLICATE)
    if mirrored:
        cv2.flip(cv2.resize(pixels, (side, side), interpolation=method), 1, dst=out)
    else:
        cv2.resize(pixels, (side, side), dst=out, interpolation=method)
