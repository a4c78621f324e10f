"""Shards: accepted images as tars that DALI, webdataset and plain `tar` read, with an index beside each."""

import hashlib
import io
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import simplejpeg

from stages.command import StageError
from stages.data.images import encode_jpeg, is_baseline_rgb_jpeg, resize_shorter, to_rgb
from stages.data.raw import read_at
from stages.files import sha256, write_json, write_text
from stages.params.shard import Shard
from stages.progress import progress, worker_count

SPLITS = ("train", "val", "test", "fresh")


@dataclass(frozen=True)
class RawImage:
    """Where an accepted image lies in the raw tars, and its label."""

    key: str
    tar: str
    offset: int
    bytes: int
    sha256: str
    label: int


@dataclass(frozen=True)
class PixelSums:
    """Exact sums over all pixels of each channel, so that their order does not matter."""

    pixels: int
    sums: tuple[int, int, int]
    squares: tuple[int, int, int]


@dataclass(frozen=True)
class WrittenShard:
    """A shard as `index.json` lists it, and the pixel sums of what is in it."""

    file: str
    count: int
    bytes: int
    sha256: str
    idx_sha256: str
    pixels: PixelSums


def write_shard_set(accepted: pd.DataFrame, raw: Path, out: Path, shard: Shard, role: str, batch: str) -> int:
    """Writes all shards of a batch and `index.json` into `out`. Returns the number of images.

    Args:
        accepted: rows of stages.data.facts.ACCEPTED.
        raw: folder of the batch's raw tars.

    Raises:
        StageError: a raw image is not what scan saw.
    """
    index: dict[str, Any] = {
        "batch": batch, "role": role, "resize": shard.resize, "quality": shard.quality, "splits": {}, "labels": {},
    }  # fmt: skip
    pixels: list[PixelSums] = []
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = accepted[accepted["split"] == split]
        if rows.empty:
            continue
        written = _write_split(rows, raw, out, shard, split, batch)
        index["splits"][split] = {"count": len(rows), "shards": [_entry(each) for each in written]}
        index["labels"][split] = {str(label): int(n) for label, n in rows["label"].value_counts().sort_index().items()}
        if split == "train":
            pixels = [each.pixels for each in written]
    index |= channel_statistics(pixels)
    write_json(out / "index.json", index)
    return len(accepted)


def channel_statistics(parts: list[PixelSums]) -> dict[str, list[float] | None]:
    """Mean and standard deviation of R, G and B, in 0-1, over all pixels; null where there are none."""
    count = sum(part.pixels for part in parts)
    if not count:
        return {"mean": None, "std": None}
    means = [sum(part.sums[c] for part in parts) / count for c in range(3)]
    squares = [sum(part.squares[c] for part in parts) / count for c in range(3)]
    stds = [max(square - mean**2, 0.0) ** 0.5 for square, mean in zip(squares, means, strict=True)]
    return {"mean": [round(m / 255, 6) for m in means], "std": [round(s / 255, 6) for s in stds]}


def _write_split(rows: pd.DataFrame, raw: Path, out: Path, shard: Shard, split: str, batch: str) -> list[WrittenShard]:
    # The key order does not depend on how rows arrived; the shuffle at writing mixes the classes.
    order = np.random.default_rng([shard.seed, SPLITS.index(split)]).permutation(len(rows))
    columns = [each.name for each in fields(RawImage)]
    shuffled = rows.sort_values("key").iloc[order]
    images = [RawImage(*values) for values in zip(*(shuffled[column].tolist() for column in columns), strict=True)]
    pieces = [images[at : at + shard.images_per_shard] for at in range(0, len(images), shard.images_per_shard)]
    paths = [out / f"{split}-{number:05d}.tar" for number in range(len(pieces))]
    write = partial(_write_shard, raw=raw, resize=shard.resize, quality=shard.quality)
    with ProcessPoolExecutor(min(worker_count(), len(pieces))) as pool:
        return list(progress(pool.map(write, pieces, paths), len(pieces), f"shard {batch} {split}"))


def _write_shard(images: list[RawImage], path: Path, raw: Path, resize: int, quality: int) -> WrittenShard:
    lines = []
    parts = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for image in images:
            jpeg = shard_image(_read_raw(raw / image.tar, image), resize, quality)
            parts.append(_pixel_sums(jpeg))
            # webdataset takes everything up to the first dot of the file name as the sample's key.
            name = quote(image.key, safe="/", errors="surrogateescape").replace(".", "%2E")
            cls = f"{image.label:05d}".encode()
            lines.append(" ".join((_add(tar, f"{name}.jpg", "jpg", jpeg), _add(tar, f"{name}.cls", "cls", cls))))
    idx = path.with_suffix(".idx")
    write_text(idx, "\n".join([f"v1.2 {len(lines)}", *lines, ""]))
    return WrittenShard(path.name, len(lines), path.stat().st_size, sha256(path), sha256(idx), _add_up(parts))


def shard_image(data: bytes, resize: int, quality: int) -> bytes:
    """An image as it is stored in a shard: upright RGB JPEG, shorter side at most `resize` pixels.

    What is so already is passed through, byte for byte.
    """
    if is_baseline_rgb_jpeg(data):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if min(height, width) <= resize:
            return data
    return encode_jpeg(resize_shorter(to_rgb(data), resize), quality)


def _read_raw(tar: Path, image: RawImage) -> bytes:
    data = read_at(tar, image.offset, image.bytes)
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise StageError(
            f"{tar} is damaged: {image.key} is not what scan saw. Restore the batch with "
            f"`dvc checkout --force {tar.parent.parent}` or `dvc pull --force {tar.parent.parent}`, then run again"
        )
    return data


def _add(tar: tarfile.TarFile, name: str, extension: str, data: bytes) -> str:
    """Adds a file; returns its entry in a DALI index file (v1.2): extension, offset, size, name."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return f"{extension} {tar.offset - padded} {len(data)} {name}"


def _pixel_sums(jpeg: bytes) -> PixelSums:
    pixels = simplejpeg.decode_jpeg(jpeg, "RGB").reshape(-1, 3)
    histograms = [np.bincount(pixels[:, c], minlength=256) for c in range(3)]
    values = np.arange(256)
    return PixelSums(
        pixels=len(pixels),
        sums=tuple(int(h @ values) for h in histograms),  # type: ignore[arg-type]
        squares=tuple(int(h @ values**2) for h in histograms),  # type: ignore[arg-type]
    )


def _add_up(parts: list[PixelSums]) -> PixelSums:
    return PixelSums(
        pixels=sum(part.pixels for part in parts),
        sums=tuple(sum(part.sums[c] for part in parts) for c in range(3)),  # type: ignore[arg-type]
        squares=tuple(sum(part.squares[c] for part in parts) for c in range(3)),  # type: ignore[arg-type]
    )


def _entry(shard: WrittenShard) -> dict[str, Any]:
    entry = asdict(shard)
    del entry["pixels"]
    return entry
