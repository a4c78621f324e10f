"""Long work shows progress: a bar in a terminal, a line every half a minute in a log."""

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
    """Passes `items` on, `total` of them, and shows how far it is."""
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
    """How many processes parallel work uses: SYNSET_WORKERS, or all cores that this process may use.

    Not a parameter: it never changes bytes, so it must not make DVC run anything again.

    Raises:
        StageError: SYNSET_WORKERS is no number.
    """
    wanted = os.environ.get("SYNSET_WORKERS") or "0"
    if not wanted.isdecimal():
        raise StageError(f"SYNSET_WORKERS must be a number of processes (or unset: all cores), got {wanted!r}")
    return int(wanted) or len(os.sched_getaffinity(0))
