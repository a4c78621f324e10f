"""One pass over raw tars: a row of facts an image.

The work is cut into pieces: a tar, or a part of a large one. The facts of each are a Parquet file in a work folder, so
that an interrupted run leaves whole ones to the next, and no process holds more rows than `ROWS`.
"""

import hashlib
import logging
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.parallel.crash_safe_pool import Death, Say, each_apart
from stages.data.raw.facts import FACTS, write_tables
from stages.data.raw.images import Header, brightness_and_contrast, decode_strictly, difference_hash, read_header
from stages.data.raw.tars import Member, members, parts, unreadable
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)

# Of a file that is read and decoded; of a larger one only its head is looked at.
MOST_BYTES = 2**28
HEAD_BYTES = 2**20
# A tar is scanned in parts where it is larger than a 64th of its batch: enough to keep many cores busy, and to lose
# little with a kill. Within limits: to find where parts begin costs a look at every header.
PARTS = 64
LEAST_PART, MOST_PART = 2**22, 2**28
# Read, made into a table and forgotten at once.
ROWS = 1024
CRASHES = {-int(each) for each in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)}
"""Exit codes of a process that went down by itself, in contrast to one that was killed."""


class Piece(NamedTuple):
    """A part of a raw tar, scanned at once."""

    tar: str  # relative to the batch's folder
    start: int  # offset of the first header
    end: int | None  # None: to the end of the tar
    crashed: frozenset[int] = frozenset()
    """Offsets of images at which the decoder crashed, and that are not decoded again."""

    def file(self, work: Path) -> Path:
        """Where its facts are, once they are whole."""
        return work / self.tar / f"{self.start:015d}.parquet"


def scan_tar(path: Path, folder: Path, batch: str) -> list[dict[str, Any]]:
    """Facts (stages/data/raw/facts.py) of every file in a raw tar below `folder`, in the tar's order."""
    return list(_rows(Piece(path.relative_to(folder).as_posix(), 0, None), folder, batch, lambda _: None))


def cut(tars: list[Path], folder: Path, workers: int) -> list[Piece]:
    """The pieces of all tars, in their order.

    Raises:
        StageError: a tar is damaged, or none of ingest's.
    """
    sizes = {tar: tar.stat().st_size for tar in tars}
    part = min(max(sum(sizes.values()) // PARTS, LEAST_PART), MOST_PART)
    large = deque(tar for tar, size in sizes.items() if size > part)
    starts = dict(_results(each_apart(partial(_parts, folder=folder, size=part), large, workers)))
    pieces = []
    for tar in tars:
        begins = starts.get(tar, [0])
        ends = [*begins[1:], None]
        name = tar.relative_to(folder).as_posix()
        pieces += [Piece(name, start, end) for start, end in zip(begins, ends, strict=True)]
    return pieces


def scan_pieces(
    pieces: Iterable[Piece], folder: Path, batch: str, work: Path, workers: int
) -> Generator[Piece, None, None]:
    """Writes the facts of each piece to its file in `work`; gives it back when it is whole.

    An image at which the decoder crashes its process, twice, is not decoded: its row says so.

    Raises:
        StageError: a process was killed; a tar is damaged.
    """
    waiting = deque(pieces)
    scan = partial(write_piece, folder=folder, batch=batch, work=work)
    seen: set[tuple[str, int]] = set()
    for piece, death in each_apart(scan, waiting, workers):
        if not isinstance(death, Death):
            yield piece
            continue
        where = f"{folder / piece.tar}, at the file whose bytes begin at {death.place}"
        if death.exitcode not in CRASHES or death.place < 0:
            raise StageError(_killed(death.exitcode, where, workers))
        if (piece.tar, death.place) in seen:
            logger.warning("%s: the decoder crashed (exit code %d); it is not decoded", where, death.exitcode)
            piece = piece._replace(crashed=piece.crashed | {death.place})
        seen.add((piece.tar, death.place))
        waiting.appendleft(piece)


def write_piece(piece: Piece, say: Say, folder: Path, batch: str, work: Path) -> None:
    """Writes the facts of a piece to its file in `work`."""
    cv2.setNumThreads(1)  # there are as many processes as cores
    write_tables(_tables(_rows(piece, folder, batch, say)), FACTS, piece.file(work))


def read_pieces(pieces: Iterable[Piece], work: Path) -> Iterator[pa.Table]:
    """The facts of pieces that are whole, a few thousand rows at a time.

    Raises:
        StageError: a file was damaged, and has been removed.
    """
    for piece in pieces:
        file = piece.file(work)
        try:
            with pq.ParquetFile(file) as parquet:
                for some in parquet.iter_batches(batch_size=8 * ROWS):
                    yield pa.Table.from_batches([some])
        except (pa.ArrowInvalid, OSError) as error:
            file.unlink(missing_ok=True)
            raise StageError(f"{file} was damaged ({error}) and is removed; run again to scan {piece.tar}") from error


def image_facts(data: bytes) -> dict[str, Any]:
    """What one image is, from its bytes alone."""
    header = read_header(data)
    facts = _undecoded(header, hashlib.sha256(data).hexdigest())
    try:
        luminance = decode_strictly(data, header)
    except ValueError as error:
        return facts | {"error": str(error)}
    brightness, contrast = brightness_and_contrast(luminance)
    return facts | {
        "decodes": True,
        "hash": difference_hash(luminance),
        "brightness": brightness,
        "contrast": contrast,
    }


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


def _rows(piece: Piece, folder: Path, batch: str, say: Say) -> Iterator[dict[str, Any]]:
    path = folder / piece.tar
    try:
        with path.open("rb", buffering=0) as tar:
            for member in members(path, folder, piece.start, piece.end):
                say(member.offset)
                yield {
                    "key": f"{batch}/{member.path}",
                    "batch": batch,
                    "source_split": member.split,
                    "class_name": member.class_name,
                    "tar": piece.tar,
                    "offset": member.offset,
                    "bytes": member.size,
                    **_member_facts(tar, member, member.offset in piece.crashed),
                }
    except OSError as error:
        raise unreadable(path, error) from error


def _member_facts(tar: IO[bytes], member: Member, crashed: bool) -> dict[str, Any]:
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


def _parts(tar: Path, say: Say, folder: Path, size: int) -> list[int]:
    return parts(tar, folder, size)


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
