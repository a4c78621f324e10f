"""Whether two images are the same picture: by thumbnails of their luminance, and what these confirm by local_match.py.

Thumbnails are cached between runs: after a new batch, or a change of limits, only new images are decoded.
"""

import hashlib
import logging
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from stages.data.raw import images as raw_images
from stages.data.raw.images import decode_strictly, read_header
from stages.data.raw.tars import read_at
from stages.data.validation import local_match
from stages.data.validation.near_duplicates import SamePicture
from stages.params.validate import Validate
from stages.runtime.command import StageError
from stages.runtime.files import replaced_file, sha256
from stages.runtime.progress import progress, worker_count

logger = logging.getLogger(__name__)

SIDE = 32  # of thumbnails, in pixels
PAIRS_AT_ONCE, IMAGES_A_TASK = 10_000, 64


def maker() -> str:
    """A hash of what decides the pixels of thumbnails: this code and the decoders."""
    parts = [sha256(Path(code)) for code in (__file__, raw_images.__file__)] + list(
        map(version, ("pillow", "simplejpeg"))
    )
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def pixel_confirmation(
    rows: pd.DataFrame, raw: Sequence[Path], limits: Validate, cache: Path | None = None
) -> SamePicture:
    """A `SamePicture` that reads the images themselves.

    Args:
        rows: images as given to `find_duplicates`, columns sha256, tar, offset, bytes, width, height.
        raw: folder of the raw tars of each row.
        limits: when two images are the same picture.
        cache: file of thumbnails made before; afterwards it holds those that this run needs, and no others.
    """

    def same_picture(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        wanted = np.unique(np.concatenate([left, right]))
        images, folders = rows.iloc[wanted], [raw[position] for position in wanted]
        pictures = _cached_thumbnails(images, folders, cache) if cache else thumbnails(images, folders)
        same = same_thumbnails(pictures, np.searchsorted(wanted, left), np.searchsorted(wanted, right), limits)
        if limits.near_duplicate_local is not None and same.any():
            alike = np.stack([left[same], right[same]], axis=1)
            wanted, pairs = np.unique(alike, return_inverse=True)
            images, folders = rows.iloc[wanted], [raw[position] for position in wanted]
            sides = local_match.picture_sides(images)
            larger = _pictures(images.assign(side=sides), folders, _larger, (local_match.SIDE, local_match.SIDE))
            same[same] = local_match.same_locally(larger, sides, pairs.reshape(-1, 2), limits.near_duplicate_local)
        return same

    return same_picture


def _cached_thumbnails(rows: pd.DataFrame, raw: Sequence[Path], cache: Path) -> np.ndarray:
    names = rows["sha256"].to_numpy(dtype="S64")
    known, of_known = _read(cache)
    place = np.searchsorted(known, names)
    is_known = place < np.searchsorted(known, names, side="right")
    pictures = np.zeros((len(rows), SIDE * SIDE), dtype=np.uint8)
    pictures[is_known] = of_known[place[is_known]]
    (new,) = np.nonzero(~is_known)
    pictures[new] = thumbnails(rows.iloc[new], [raw[position] for position in new.tolist()])
    if len(new) or len(known) > len(names):
        order = np.argsort(names)
        with replaced_file(cache) as aside, aside.open("wb") as file:
            np.savez(file, sha256=names[order], pixels=pictures[order])
    return pictures


def _read(cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """sha256 of images, sorted, (N,) of 64 bytes; and their thumbnails (N, 1024) uint8."""
    nothing = np.empty(0, "S64"), np.empty((0, SIDE * SIDE), np.uint8)
    try:
        with np.load(cache) as arrays:
            return arrays["sha256"], arrays["pixels"]
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s): all thumbnails are made anew", cache, error)
        return nothing


def same_thumbnails(pictures: np.ndarray, left: np.ndarray, right: np.ndarray, limits: Validate) -> np.ndarray:
    """Whether pairs of thumbnails are alike, (P,) bool: both in mean absolute difference and in correlation (Pearson).

    Args:
        pictures: (N, 1024) uint8.
        left: (P,), positions in `pictures`.
        right: (P,), positions in `pictures`.
        limits: `near_duplicate_difference` and `near_duplicate_correlation`.
    """
    same = np.zeros(len(left), dtype=bool)
    sums = pictures.sum(axis=1, dtype=np.int64)
    squares = np.einsum("ij,ij->i", pictures, pictures, dtype=np.int64, casting="unsafe")
    for start in range(0, len(left), PAIRS_AT_ONCE):
        i, j = left[start : start + PAIRS_AT_ONCE], right[start : start + PAIRS_AT_ONCE]
        one, other = pictures[i].astype(np.int32), pictures[j].astype(np.int32)
        difference = np.abs(one - other).mean(axis=1)
        products = np.einsum("ij,ij->i", one, other).astype(np.int64)  # at most 1024 * 255 * 255: it fits 32 bits
        correlation = _correlation(one.shape[1], products, (sums[i], sums[j]), (squares[i], squares[j]))
        same[start : start + PAIRS_AT_ONCE] = (difference <= limits.near_duplicate_difference) & (
            correlation >= limits.near_duplicate_correlation
        )
    return same


Two = tuple[np.ndarray, np.ndarray]


def _correlation(count: int, products: np.ndarray, sums: Two, squares: Two) -> np.ndarray:
    """From whole numbers, so that all machines agree; a picture of a single colour correlates with nothing."""
    covariance = count * products - sums[0] * sums[1]
    variances = [count * square - total * total for total, square in zip(sums, squares, strict=True)]
    scale = np.sqrt(variances[0].astype(np.float64)) * np.sqrt(variances[1].astype(np.float64))
    return np.divide(covariance, scale, out=np.zeros(len(products)), where=scale > 0)


def thumbnails(rows: pd.DataFrame, raw: Sequence[Path]) -> np.ndarray:
    """Luminance thumbnails, (N, 1024) uint8, of images in raw tars, read in the order of the tars.

    Args:
        rows: columns tar, offset, bytes.
        raw: folder of the raw tars of each row.

    Raises:
        StageError: a raw tar is gone, or does not hold what the facts say.
    """
    return _pictures(rows.assign(side=SIDE), raw, _thumbnail, (SIDE * SIDE,))


def _pictures(
    rows: pd.DataFrame, raw: Sequence[Path], make: Callable[[bytes, int], np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """What `make` makes of each image's bytes and its column `side`, (N, *shape) uint8."""
    places = pd.DataFrame({name: rows[name].to_numpy() for name in ("tar", "offset", "bytes", "side")})
    places["folder"] = [str(folder) for folder in raw]
    places = places.sort_values(["folder", "tar", "offset"])
    parts = np.array_split(np.arange(len(places)), max(len(places) // IMAGES_A_TASK, 1))
    pictures = np.zeros((len(rows), *shape), dtype=np.uint8)

    def made_of(some: pd.DataFrame) -> np.ndarray:
        columns = (some[name].tolist() for name in ("folder", "tar", "offset", "bytes", "side"))
        made = [
            _made(Path(folder) / tar, at, size, side, make)
            for folder, tar, at, size, side in zip(*columns, strict=True)
        ]
        return np.array(made, dtype=np.uint8).reshape(len(some), *shape)

    with ThreadPoolExecutor(worker_count()) as pool:  # decoding lets go of the interpreter's lock
        made = pool.map(made_of, (places.iloc[part] for part in parts))
        for part, some in progress(zip(parts, made, strict=True), len(parts), "comparing pixels"):
            pictures[places.index[part]] = some
    return pictures


def _made(tar: Path, offset: int, size: int, side: int, make: Callable[[bytes, int], np.ndarray]) -> np.ndarray:
    data = read_at(tar, offset, size)
    try:
        return make(data, side)
    except ValueError as error:
        raise StageError(f"{tar} has changed since it was scanned ({error}); `dvc checkout` restores it") from error


def _thumbnail(data: bytes, side: int) -> np.ndarray:
    return _square(decode_strictly(data, read_header(data)), side).reshape(-1)


def _larger(data: bytes, side: int) -> np.ndarray:
    picture = _square(decode_strictly(data, read_header(data), local_match.DECODED), side)
    times = local_match.SIDE // side
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _square(luminance: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(luminance).resize((side, side), Image.Resampling.BOX))
