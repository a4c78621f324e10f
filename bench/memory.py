"""How much memory a piece of work takes at its peak, all of its processes together."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

SECONDS_BETWEEN_LOOKS = 0.1
# The kernel walks all pages of a process for each look, and meanwhile that process gets no new ones: looks at gigabytes
# are rarer, so that they take a twentieth of the time at most.
REST = 20


@contextmanager
def sampled_memory() -> Iterator[list[int]]:
    """Samples of what all processes below this one hold, in bytes: proportional sets, so shared pages count once."""
    samples = [0]
    over = threading.Event()

    def watch() -> None:
        own, took = psutil.Process(), 0.0
        while not over.wait(max(SECONDS_BETWEEN_LOOKS, REST * took)):
            began = time.perf_counter()
            samples.append(sum(_held(process) for process in own.children(recursive=True)))
            took = time.perf_counter() - began

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _held(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0  # it has ended meanwhile
