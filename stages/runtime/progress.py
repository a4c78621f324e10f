"""Progress of long work: a bar in a terminal, a line every 30 seconds in a log; and the number of processes."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from stages.runtime.command import StageError

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30
logger = logging.getLogger(__name__)


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yields the `total` items and shows how many are done."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, leave=False)
        return
    shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - shown > SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            logger.info("%s: %d of %d", what, done, total)


def worker_count() -> int:
    """Number of processes for parallel work: SYNSET_WORKERS, or all cores that this process may use.

    It is no parameter: it never changes bytes, so a change must not make DVC run anything again.

    Raises:
        StageError: SYNSET_WORKERS is no number.
    """
    wanted = os.environ.get("SYNSET_WORKERS") or "0"
    if not wanted.isdecimal():
        raise StageError(f"SYNSET_WORKERS must be a number of processes (or unset: all cores), got {wanted!r}")
    return int(wanted) or len(os.sched_getaffinity(0))
