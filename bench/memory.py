"""How much memory a piece of work takes at its peak, all of its processes together."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

SECONDS_BETWEEN_LOOKS = 0.1


@contextmanager
def sampled_memory() -> Iterator[list[int]]:
    """Samples of what all processes below this one hold, in bytes: proportional sets, so shared pages count once."""
    samples = [0]
    over = threading.Event()

    def watch() -> None:
        own = psutil.Process()
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            samples.append(sum(_held(process) for process in own.children(recursive=True)))

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
