"""One pass over raw tars: a row of facts per image.

Each tar is a part, or several if it is large. The facts of a part are a Parquet file in a work folder, so that the run
after an interrupted one finds whole parts, and no process holds more rows than `ROWS`.
"""

import hashlib
import logging
import os
import shutil
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.data.parallel.crash_safe_pool import Death, Report, alone, run_tasks
from stages.data.raw.facts import FACTS
from stages.data.raw.images import Header, brightness_and_contrast, decode_strictly, difference_hash, read_header
from stages.data.raw.tars import RawFile, members, part_starts, raw_tars, unreadable
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.fingerprint import fingerprint, prune, work_folder
from stages.runtime.progress import progress, worker_count
from stages.runtime.tables import write_tables

logger = logging.getLogger(__name__)

# Files up to this size are read and decoded; of a larger one only the header is read.
MOST_BYTES = 2**28
HEAD_BYTES = 2**20
# A tar larger than a 64th of its batch is scanned in parts: enough to keep many cores busy, and to lose little with a
# kill. Parts have limits, as every header has to be read to find where they begin.
PARTS = 64
LEAST_PART, MOST_PART = 2**22, 2**28
# Read, made into a table and forgotten at once.
ROWS = 1024
CRASHES = {-int(each) for each in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)}
"""Exit codes of a process that crashed, in contrast to one that was killed."""


class TarPart(NamedTuple):
    """A range of a raw tar that one process scans as a whole."""

    tar: str  # relative to the batch's folder
    start: int  # offset of the first header
    end: int | None  # None: to the end of the tar
    crashed: frozenset[int] = frozenset()
    """Offsets of images at which the decoder crashed, and that are not decoded again."""

    def file(self, work: Path) -> Path:
        """Where its facts are, once they are whole."""
        return work / self.tar / f"{self.start:015d}.parquet"


def scan(batch: str, role: str) -> None:
    """Scans the raw tars of one batch in parallel, from where an interrupted run left off; rows are in their order.

    Raises:
        StageError: there are no raw tars, or what `scan_parts` raises.
    """
    folder, out = layout.raw(role, batch), layout.facts(role, batch)
    tars = raw_tars(folder)
    if not tars:
        raise StageError(f"{folder} holds no raw tars; `dvc repro ingest@{batch}` makes them, `dvc pull` brings them")
    work, workers = work_folder(f"scan@{batch}", fingerprint(f"scan@{batch}")), worker_count()
    with alone(work.parent):
        prune(work.parent, keep=work)
        parts = tar_parts(tars, folder, workers)
        left = [part for part in parts if not part.file(work).is_file()]
        if len(left) < len(parts):
            logger.info("scan %s: goes on after %d of %d parts", batch, len(parts) - len(left), len(parts))
        with closing(scan_parts(left, folder, batch, work, workers)) as done:
            for _ in progress(done, len(left), f"scan {batch}"):
                pass
        write_tables(read_parts(parts, work), FACTS, out)
        shutil.rmtree(work)
    decodes = pq.ParquetFile(out).read(columns=["decodes"])["decodes"]
    logger.info("scan %s: %d files, %d do not decode", batch, len(decodes), pc.sum(pc.invert(decodes)).as_py() or 0)


def tar_parts(tars: list[Path], folder: Path, workers: int) -> list[TarPart]:
    """Divides all tars into parts, in their order.

    Raises:
        StageError: a tar is damaged, or none of ingest's.
    """
    sizes = {tar: tar.stat().st_size for tar in tars}
    size = min(max(sum(sizes.values()) // PARTS, LEAST_PART), MOST_PART)
    large = deque(tar for tar in tars if sizes[tar] > size)
    starts = dict(_results(run_tasks(partial(_part_starts, folder=folder, size=size), large, workers)))
    parts = []
    for tar in tars:
        begins, name = starts.get(tar, [0]), tar.relative_to(folder).as_posix()
        ends = [*begins[1:], None]
        parts += [TarPart(name, start, end) for start, end in zip(begins, ends, strict=True)]
    return parts


def scan_parts(
    parts: Iterable[TarPart], folder: Path, batch: str, work: Path, workers: int
) -> Generator[TarPart, None, None]:
    """Writes the facts of each part to its file in `work`; yields the part when that is whole.

    An image that crashes its process twice is not decoded: its row says so.

    Raises:
        StageError: a process was killed; a tar is damaged.
    """
    waiting = deque(parts)
    write = partial(write_part, folder=folder, batch=batch, work=work)
    seen: set[tuple[str, int]] = set()
    for part, death in run_tasks(write, waiting, workers):
        if not isinstance(death, Death):
            yield part
            continue
        where = f"{folder / part.tar}, at the file whose bytes begin at {death.position}"
        if death.exitcode not in CRASHES or death.position < 0:
            raise StageError(_killed(death.exitcode, where, workers))
        if (part.tar, death.position) in seen:
            logger.warning("%s: the decoder crashed (exit code %d); it is not decoded", where, death.exitcode)
            part = part._replace(crashed=part.crashed | {death.position})
        seen.add((part.tar, death.position))
        waiting.appendleft(part)


def write_part(part: TarPart, report: Report, folder: Path, batch: str, work: Path) -> None:
    """Writes the facts of a part to its file in `work`."""
    cv2.setNumThreads(1)  # there are as many processes as cores
    write_tables(_tables(rows_of(part, folder, batch, report)), FACTS, part.file(work))


def read_parts(parts: Iterable[TarPart], work: Path) -> Iterator[pa.Table]:
    """The facts of whole parts, a few thousand rows at a time.

    Raises:
        StageError: a file was damaged, and has been removed.
    """
    for part in parts:
        file = part.file(work)
        try:
            with pq.ParquetFile(file) as parquet:
                for some in parquet.iter_batches(batch_size=8 * ROWS):
                    yield pa.Table.from_batches([some])
        except (pa.ArrowInvalid, OSError) as error:
            file.unlink(missing_ok=True)
            raise StageError(f"{file} was damaged ({error}) and is removed; run again to scan {part.tar}") from error


def rows_of(part: TarPart, folder: Path, batch: str, report: Report) -> Iterator[dict[str, Any]]:
    """Facts (stages/data/raw/facts.py) of every file in a part, in the tar's order; reports each one's offset first.

    Raises:
        StageError: the tar is damaged, or cannot be read.
    """
    path = folder / part.tar
    try:
        with path.open("rb", buffering=0) as tar:
            for member in members(path, folder, part.start, part.end):
                report(member.offset)
                yield {
                    "key": f"{batch}/{member.path}",
                    "batch": batch,
                    "source_split": member.split,
                    "class_name": member.class_name,
                    "tar": part.tar,
                    "offset": member.offset,
                    "bytes": member.size,
                    "group": member.group,
                    **_member_facts(tar, member, member.offset in part.crashed),
                }
    except OSError as error:
        raise unreadable(path, error) from error


def image_facts(data: bytes) -> dict[str, Any]:
    """Facts of one image, from its bytes alone."""
    header = read_header(data)
    facts = _undecoded(header, hashlib.sha256(data).hexdigest())
    try:
        luminance = decode_strictly(data, header)
    except ValueError as error:
        return facts | {"error": str(error)}
    brightness, contrast = brightness_and_contrast(luminance)
    return facts | {"decodes": True, "hash": difference_hash(luminance), "brightness": brightness, "contrast": contrast}


def _undecoded(header: Header, sha256: str, error: str = "") -> dict[str, Any]:
    return {
        "sha256": sha256,
        "format": header.format,
        "width": header.width,
        "height": header.height,
        "mode": header.mode,
        "orientation": header.orientation,
        "decodes": False,
        "error": error,
        "hash": 0,
        "brightness": float("nan"),
        "contrast": float("nan"),
    }


def _tables(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    while some := list(islice(rows, ROWS)):
        yield pa.Table.from_pylist(some, FACTS)


def _member_facts(tar: IO[bytes], member: RawFile, crashed: bool) -> dict[str, Any]:
    if member.size <= MOST_BYTES and not crashed:
        return image_facts(os.pread(tar.fileno(), member.size, member.offset))
    digest = hashlib.sha256()
    header = Header()
    for at in range(0, member.size, HEAD_BYTES):
        data = os.pread(tar.fileno(), min(member.size - at, HEAD_BYTES), member.offset + at)
        if at == 0 and not crashed:
            header = read_header(data)
        digest.update(data)
    error = "the decoder crashed" if crashed else f"larger than {MOST_BYTES} bytes"
    return _undecoded(header, digest.hexdigest(), error)


def _part_starts(tar: Path, _: Report, folder: Path, size: int) -> list[int]:
    return part_starts(tar, folder, size)


def _results(results: Iterable[tuple[Path, list[int] | Death]]) -> Iterator[tuple[Path, list[int]]]:
    for tar, result in results:
        if isinstance(result, Death):
            raise StageError(f"the process that listed {tar} was killed (exit code {result.exitcode}); run again")
        yield tar, result


def _killed(exitcode: int, where: str, workers: int) -> str:
    how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
    memory = (
        f". The system does this when memory runs out: set SYNSET_WORKERS to fewer than {workers}"
        if exitcode == -signal.SIGKILL
        else ""
    )
    return f"the process that scanned {where}, {how}{memory}. What is finished is kept: run again"
