"""The same function for many items, on the cores of this machine or the workers of a Dask cluster (docs/scale-out.md).

For work that does not crash its process: all that is decoded here, scan has decoded before. Work on files of strangers
goes to crash_safe_pool.py, and a search in NumPy arrays to threads.
"""

import logging
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import cv2

from stages.runtime.command import StageError
from stages.runtime.progress import worker_count

logger = logging.getLogger(__name__)
P = TypeVar("P")
R = TypeVar("R")

SECONDS_BETWEEN_CHECKS = 1.0
KEPT = "What is finished is kept: run the same command again"


def parallel_map(
    function: Callable[[P], R], items: Sequence[P], cluster: str | None, folder: Path
) -> Generator[R, None, None]:
    """Results of `function`, one per item, in the order in which they are ready.

    Closing the iterator, or an error, cancels what has not begun.

    Args:
        function: it goes to a cluster by value, with the project's code that it calls, so the same code runs there.
        items: small, as all are sent.
        cluster: address of a Dask scheduler; None: processes on this machine.
        folder: all workers must see it.

    Raises:
        StageError: of `function`; a process died; the cluster cannot be reached, or a worker would write other bytes.
    """
    if not items:
        return
    if cluster:
        from stages.data.parallel.dask_cluster import on_cluster  # Dask takes a second to import

        yield from on_cluster(function, items, cluster, folder)
    else:
        yield from _on_this_machine(function, items, min(worker_count(), len(items)))


def processor() -> str:
    """The kind of processor: OpenCV chooses its code by it, so it decides the bytes of resized images."""
    import cv2  # again: it travels to a worker that may lack OpenCV, and be told so (dask_cluster.py)

    ipp = cv2.ipp.getIppVersion() if cv2.ipp.useIPP() else "without IPP"
    return f"{platform.machine()}; {cv2.getCPUFeaturesLine()}; {ipp}"


def _on_this_machine(function: Callable[[P], R], items: Sequence[P], workers: int) -> Iterator[R]:
    # A forked process waits for ever for threads that OpenCV had; with one it has none.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent, initargs=(os.getpid(),))
    try:
        for future in as_completed([pool.submit(function, item) for item in items]):
            yield future.result()
    except BrokenProcessPool:
        raise StageError(
            f"one of {workers} worker processes was killed; if memory ran out, set SYNSET_WORKERS to fewer. {KEPT}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(threads)


def _end_with_parent(parent: int) -> None:
    """Ends a worker whose parent was killed: it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends its workers

    def watch() -> None:
        # The parent's end closes no pipe: processes forked later hold them too.
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_CHECKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
