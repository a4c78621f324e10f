"""Shards: accepted images as tars that DALI, webdataset and plain `tar` read, with an index beside each.

Work in progress is a folder that an interrupted run leaves to the next one:

    plan/<split>.parquet    which image goes where: a row group a shard
    shards/                 finished shards with their index files; in the end index.json too
    entries/<shard>.json    what index.json says of a shard, and the sums of its pixels; written when the shard is whole
    aside/                  what is being written
"""

import hashlib
import io
import json
import logging
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.parallel.crash_safe_pool import alone
from stages.data.parallel.parallel_map import parallel_map, processor
from stages.data.raw.images import DAMAGED, encode_jpeg, resize_shorter, upright_pixels
from stages.data.raw.tars import read_at
from stages.params.shard import Shard, Shards
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import move_directory, replaced_file, sha256, write_json, write_text
from stages.runtime.fingerprint import fingerprint, prune, work_folder
from stages.runtime.progress import progress

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test", "fresh")
COLUMNS = ("key", "tar", "offset", "bytes", "sha256", "label")
"""Columns of the accepted table: the raw image and its label."""
IN_INDEX = ("file", "count", "bytes", "sha256", "idx_sha256")
"""What index.json repeats of a shard's entry."""
FILES = {"": "tar", "idx_": "idx"}
"""Prefix of a checksum in a shard's entry -> suffix of the file."""


PixelSums = list[int]
"""Number of pixels, then the sums of R, G, B, then of their squares: exact, so that the order does not matter."""


class RawImage(NamedTuple):
    """Where an accepted image lies in the raw tars, and its label."""

    key: str
    tar: str
    offset: int
    bytes: int
    sha256: str
    label: int


class PlannedShard(NamedTuple):
    """One shard to be written: a row group of the plan of its split."""

    split: str
    number: int

    @property
    def name(self) -> str:
        """Of its files, without their suffix."""
        return f"{self.split}-{self.number:05d}"


def shard(batch: str, role: str, shards: Shards) -> None:
    """Writes the shard set of one batch, from where an interrupted run of the same left off.

    Raises:
        StageError: no image of the batch was accepted; what `write_shard_set` raises.
    """
    path = layout.accepted(role, batch)
    try:
        accepted = pd.read_parquet(path, columns=[*COLUMNS, "split"])
    except FileNotFoundError:
        raise StageError(f"{path} is missing; `dvc repro validate` makes it, `dvc pull` brings it") from None
    if accepted.empty:
        raise StageError(f"no image of batch {batch} was accepted; {layout.VALIDATION_PAGE} says why")
    work = work_folder(f"shard@{batch}", fingerprint(f"shard@{batch}"))
    raw, out = layout.raw(role, batch), layout.shards(role, batch)
    with alone(work.parent):
        prune(work.parent, keep=work)
        count = write_shard_set(accepted, raw, out, getattr(shards, role), role, batch, work, shards.cluster)
    logger.info("shard %s: %d images", batch, count)


def write_shard_set(
    accepted: pd.DataFrame,
    raw: Path,
    out: Path,
    shard: Shard,
    role: str,
    batch: str,
    work: Path | None = None,
    cluster: str | None = None,
) -> int:
    """Writes all shards of a batch and `index.json`, which then take the place of `out`. Returns the number of images.

    Args:
        accepted: rows of stages.data.raw.facts.ACCEPTED, of which `COLUMNS` and `split` are read.
        raw: folder of the batch's raw tars.
        work: folder of what an interrupted run of the same images and parameters has finished, which is used; removed
            in the end. Default: beside `out`.
        cluster: address of a Dask scheduler that distributes the work; None: the cores of this machine.

    Raises:
        StageError: a raw image is not what scan saw; what `parallel_map` raises.
    """
    work = work or out.with_name(f".{out.name}.work")
    if cluster:  # its workers run elsewhere in the file system
        work, raw = work.absolute(), raw.absolute()
    prepare(work, out)
    planned = []
    for split in SPLITS:
        rows = accepted[accepted["split"] == split]
        if not rows.empty:
            planned += plan_split(rows, work, split, shard)
    write = partial(write_shard, work=work, raw=raw, resize=shard.resize, quality=shard.quality)
    with closing(parallel_map(write, planned, cluster, work)) as results:
        entries = {entry["file"]: entry for entry in progress(results, len(planned), f"shard {batch}")}
    index = {"batch": batch, "role": role, "resize": shard.resize, "quality": shard.quality}
    write_json(work / "shards/index.json", index | _contents(accepted, [entries[f"{one.name}.tar"] for one in planned]))
    move_directory(work / "shards", out)
    shutil.rmtree(work)
    return len(accepted)


def channel_statistics(parts: Sequence[PixelSums]) -> dict[str, list[float] | None]:
    """Mean and standard deviation of R, G and B, in 0-1, over all pixels; null where there are none."""
    count, *sums = _add_up(parts)
    if not count:
        return {"mean": None, "std": None}
    means, squares = ([total / count for total in totals] for totals in (sums[:3], sums[3:]))
    stds = [max(square - mean**2, 0.0) ** 0.5 for square, mean in zip(squares, means, strict=True)]
    return {"mean": [round(m / 255, 6) for m in means], "std": [round(s / 255, 6) for s in stds]}


def write_shard(planned: PlannedShard, work: Path, raw: Path, resize: int, quality: int) -> dict[str, Any]:
    """Writes a shard and its index file into `work`, where they are not yet; returns the shard's entry.

    Raises:
        StageError: a raw image is not what scan saw.
    """
    cv2.setNumThreads(1)  # there are as many processes as cores
    if entry := _finished(planned, work):
        return entry
    images = _rows_of(planned, work)
    # A folder of its own: a worker that Dask took for dead may still write the same shard.
    with tempfile.TemporaryDirectory(dir=work / "aside", prefix=planned.name, ignore_cleanup_errors=True) as name:
        tar, idx = (Path(name) / f"{planned.name}{suffix}" for suffix in (".tar", ".idx"))
        with replaced_file(tar) as aside:
            lines, pixels = _write_tar(images, aside, raw, resize, quality)
        write_text(idx, "\n".join([f"v1.2 {len(lines)}", *lines, ""]))
        entry = {"file": tar.name, "count": len(images), "bytes": tar.stat().st_size}
        entry |= {"sha256": sha256(tar), "idx_sha256": sha256(idx)}
        entry |= {"pixels": pixels, "processor": processor()}
        for path in (tar, idx):
            path.replace(work / "shards" / path.name)
        write_json(Path(name) / "entry", entry)
        (Path(name) / "entry").replace(_entry_path(planned, work))
    return entry


def shard_image(data: bytes, resize: int, quality: int) -> tuple[bytes, np.ndarray]:
    """An image as a shard stores it: upright RGB JPEG, shorter side at most `resize` pixels; and its pixels.

    An image that is so already keeps its bytes. Pixels are (H, W, 3) uint8, as they were before compression.
    """
    pixels, as_it_is = upright_pixels(data)
    if as_it_is and min(pixels.shape[:2]) <= resize:
        return data, pixels
    pixels = resize_shorter(pixels, resize)
    return encode_jpeg(pixels, quality), pixels


def prepare(work: Path, out: Path) -> None:
    """Makes the folders of the work in progress; takes up `out` where a run was killed after the last step."""
    shards, entries = work / "shards", work / "entries"
    if out.exists() and not shards.exists() and entries.is_dir() and any(entries.iterdir()):
        out.rename(shards)  # killed after all was done
    shutil.rmtree(work / "aside", ignore_errors=True)
    for folder in (shards, entries, work / "aside", work / "plan"):
        folder.mkdir(parents=True, exist_ok=True)


def plan_split(rows: pd.DataFrame, work: Path, split: str, shard: Shard) -> list[PlannedShard]:
    """Shuffles the images of one split and writes its plan, a row group per shard."""
    # The key order does not depend on how rows arrived; the shuffle at writing mixes the classes.
    order = np.random.default_rng([shard.seed, SPLITS.index(split)]).permutation(len(rows))
    table = pa.Table.from_pandas(rows[list(COLUMNS)].sort_values("key").iloc[order], preserve_index=False)
    with replaced_file(work / "plan" / f"{split}.parquet") as aside:
        pq.write_table(table, aside, row_group_size=shard.images_per_shard)
    return [PlannedShard(split, number) for number in range(-(-len(rows) // shard.images_per_shard))]


def _rows_of(planned: PlannedShard, work: Path) -> list[RawImage]:
    with pq.ParquetFile(work / "plan" / f"{planned.split}.parquet") as plan:
        columns = plan.read_row_group(planned.number, use_threads=False).to_pydict()
    return [RawImage(*values) for values in zip(*(columns[name] for name in COLUMNS), strict=True)]


def _finished(planned: PlannedShard, work: Path) -> dict[str, Any] | None:
    """The entry of a shard that an earlier run finished, on the same kind of processor, and that is whole."""
    try:
        entry = json.loads(_entry_path(planned, work).read_text(encoding="utf-8"))
        found = {
            f"{what}sha256": sha256(work / "shards" / f"{planned.name}.{suffix}") for what, suffix in FILES.items()
        }
    except (FileNotFoundError, ValueError):  # a kill, or a disk that lost it
        return None
    return entry if entry == entry | found | {"processor": processor()} else None


def _entry_path(planned: PlannedShard, work: Path) -> Path:
    return work / "entries" / f"{planned.name}.json"


def _write_tar(images: list[RawImage], path: Path, raw: Path, resize: int, quality: int) -> tuple[list[str], PixelSums]:
    """Lines of the index file, and the sums of all pixels."""
    lines = []
    parts = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for image in images:
            try:
                jpeg, pixels = shard_image(_read_raw(raw, image), resize, quality)
            except DAMAGED as error:
                raise StageError(
                    f"{image.key} in {raw / image.tar} cannot be decoded, though scan could: {error}"
                ) from error
            parts.append(_pixel_sums(pixels))
            # webdataset takes everything up to the first dot of the file name as the sample's key.
            name = quote(image.key, safe="/", errors="surrogateescape").replace(".", "%2E")
            cls = f"{image.label:05d}".encode()
            lines.append(" ".join((_add(tar, f"{name}.jpg", "jpg", jpeg), _add(tar, f"{name}.cls", "cls", cls))))
    return lines, _add_up(parts)


def _read_raw(raw: Path, image: RawImage) -> bytes:
    data = read_at(raw / image.tar, image.offset, image.bytes)
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise StageError(
            f"{raw / image.tar} is damaged: {image.key} is not what scan saw. Restore the batch with "
            f"`dvc checkout --force {raw}` or `dvc pull --force {raw}`, then run again"
        )
    return data


def _add(tar: tarfile.TarFile, name: str, extension: str, data: bytes) -> str:
    """Adds a file; returns its entry in a DALI index file (v1.2): extension, offset, size, name."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return f"{extension} {tar.offset - padded} {len(data)} {name}"


def _pixel_sums(pixels: np.ndarray) -> PixelSums:
    # OpenCV's figures are double precision: whole numbers after rounding, up to 10 billion pixels.
    sums = [round(value) for value in cv2.sumElems(pixels)[:3]]
    return [pixels.shape[0] * pixels.shape[1], *sums, *(round(cv2.norm(c, cv2.NORM_L2SQR)) for c in cv2.split(pixels))]


def _add_up(parts: Sequence[PixelSums]) -> PixelSums:
    return [sum(column) for column in zip([0] * 7, *parts, strict=True)]


def _contents(accepted: pd.DataFrame, entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What index.json says of the images: shards and labels of each split, and the channels of what is trained on."""
    splits: dict[str, Any] = {}
    pixels = []
    for entry in entries:
        split = entry["file"].rpartition("-")[0]
        splits.setdefault(split, []).append({name: entry[name] for name in IN_INDEX})
        if split == "train":
            pixels.append(entry["pixels"])
    counts = {split: accepted.loc[accepted["split"] == split, "label"].value_counts().sort_index() for split in splits}
    return {
        "splits": {split: {"count": int(counts[split].sum()), "shards": shards} for split, shards in splits.items()},
        "labels": {split: {str(label): int(n) for label, n in each.items()} for split, each in counts.items()},
        **channel_statistics(pixels),
    }
