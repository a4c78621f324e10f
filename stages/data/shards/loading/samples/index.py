"""Which images a split of the shards holds: key, label and place in its shard; and their encoded bytes."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from stages.data.shards.loading.samples.shard_sets import read_index
from stages.runtime.command import StageError
from stages.runtime.files import sha256

READERS = 8
"""Threads that read ahead: a network disk answers slowly, but many requests at once."""
BATCHES_AHEAD = 1

Int64 = npt.NDArray[np.int64]
Encoded = list[npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Samples:
    """One split of one or more shard sets, in file order."""

    key: list[str]
    batch: npt.NDArray[np.int32]
    """(N,) index into `batch_names`."""
    batch_names: list[str]
    shards: list[Path]
    shard: npt.NDArray[np.int32]
    """(N,) index into `shards`."""
    offset: Int64
    """(N,) of the image's first byte in its shard."""
    size: Int64
    """(N,) in bytes."""
    label: Int64
    """(N,) class index; -1: unlabelled."""

    def __len__(self) -> int:
        return len(self.key)

    def labelled(self) -> Self:
        """Without the unlabelled images."""
        return self.at(np.nonzero(self.label >= 0)[0])

    def at(self, indexes: Sequence[int] | Int64) -> Self:
        """The images at these indexes, in this order."""
        chosen = np.asarray(indexes, np.int64)
        columns = {name: getattr(self, name)[chosen] for name in ("batch", "shard", "offset", "size", "label")}
        return replace(self, key=[self.key[i] for i in chosen], **columns)

    def jpeg(self, index: int) -> bytes:
        """The encoded image at `index`.

        Opened each time: a thousand shards are more files than a process may hold open. Read, not mapped: a shard that
        changes while it is read is then a short read, not a bus error.

        Raises:
            StageError: the shard is gone, cannot be read, or is shorter than it was.
        """
        path, size = self.shards[self.shard[index]], int(self.size[index])
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(file, size, int(self.offset[index]))
            finally:
                os.close(file)
        except OSError as error:
            raise _unusable(path, f"cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise _unusable(path, "was changed while it was read")
        return data


def read_samples(shard_sets: Sequence[Path], split: str) -> Samples:
    """All images of `split` in the shard sets; a shard set without this split adds none.

    Raises:
        StageError: a shard is missing or damaged (checksums of index.json).
    """
    listed = [
        (number, shard_set, entry)
        for number, shard_set in enumerate(shard_sets)
        for entry in read_index(shard_set)["splits"].get(split, {"shards": []})["shards"]
    ]
    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(lambda shard: _checked_entries(shard[1], shard[2]), listed))
    counts = [len(keys) for keys, _ in entries]
    numbers = np.concatenate([np.empty((3, 0), np.int64), *(numbers for _, numbers in entries)], axis=1)
    return Samples(
        key=[key for keys, _ in entries for key in keys],
        batch=np.repeat(np.array([number for number, _, _ in listed], np.int32), counts),
        batch_names=[shard_set.name for shard_set in shard_sets],
        shards=[shard_set / entry["file"] for _, shard_set, entry in listed],
        shard=np.repeat(np.arange(len(listed), dtype=np.int32), counts),
        offset=numbers[0],
        size=numbers[1],
        label=numbers[2],
    )


def _checked_entries(folder: Path, entry: dict[str, Any]) -> tuple[list[str], Int64]:
    """Keys (n,), and offset, size and label (3, n), of a shard's images, once its checksums were found right."""
    path = folder / entry["file"]
    idx = path.with_suffix(".idx")
    for file, expected in ((path, entry["sha256"]), (idx, entry["idx_sha256"])):
        try:
            actual = sha256(file)
        except FileNotFoundError:
            raise _unusable(file, "is missing") from None
        except OSError as error:
            raise _unusable(file, f"cannot be read ({error.strerror})") from error
        if actual != expected:
            raise _unusable(file, "is damaged (its checksum is not that of index.json)")
    # jpg, offset, size, name, cls, offset, size, name
    lines = [line.split(" ") for line in idx.read_text(encoding="utf-8").splitlines()[1:]]
    with path.open("rb") as tar:
        labels = [int(os.pread(tar.fileno(), int(line[6]), int(line[5]))) for line in lines]
    keys = [unquote(line[3].removesuffix(".jpg"), errors="surrogateescape") for line in lines]
    return keys, np.array([[int(line[1]) for line in lines], [int(line[2]) for line in lines], labels], np.int64)


def _unusable(file: Path, how: str) -> StageError:
    folder = file.parent
    return StageError(
        f"{file} {how}. Restore it: `rm -rf {folder} && dvc checkout {folder}`, or make it anew: "
        f"`dvc repro --force --single-item shard@{folder.name}`"
    )


def equal_batches(order: Int64, batch_size: int) -> list[Int64]:
    """Batches of nearly equal size, so that the last one is not too small for batch normalisation."""
    return np.array_split(order, -(-len(order) // batch_size)) if len(order) else []


def read_ahead(samples: Samples, batches: list[Int64]) -> Iterator[Encoded]:
    """The encoded images of each batch; threads read the next batch meanwhile."""

    def read(indexes: Int64) -> Encoded:
        return [np.frombuffer(samples.jpeg(index), np.uint8) for index in indexes]

    with ThreadPoolExecutor(READERS) as pool:
        begun: deque[list[Future[Encoded]]] = deque()
        for batch in batches:
            begun.append([pool.submit(read, part) for part in np.array_split(batch, min(READERS, len(batch)))])
            if len(begun) > BATCHES_AHEAD:
                yield [jpeg for part in begun.popleft() for jpeg in part.result()]
        while begun:
            yield [jpeg for part in begun.popleft() for jpeg in part.result()]
