"""Work in processes of which any may die: whoever asked learns of which piece, at which place, and by which signal.

`concurrent.futures` says only that some process died, and gives up all the others' work with it.
"""

import ctypes
import logging
import multiprocessing
import os
import resource
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any, Generic, TypeVar

from stages.runtime.locks import locked_folder

logger = logging.getLogger(__name__)
P = TypeVar("P")
R = TypeVar("R")
Say = Callable[[int], None]
"""What a process calls to tell at which place of its piece it is (a number from 0 on)."""

# Memory that a process may take beyond what it began with. The largest picture that is decoded takes half of it.
MOST_MEMORY = 4 * 2**30
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Death:
    """How a process ended instead of giving a result; `place` is what it said last of its piece, -1 if nothing."""

    exitcode: int
    place: int


def each_apart(
    function: Callable[[P, Say], R], pieces: deque[P], workers: int
) -> Generator[tuple[P, R | Death], None, None]:
    """Pieces and their results, as they come; a process whose death is told has been replaced.

    Each process has one piece at a time, so nothing queues up, however slowly results are taken. Whoever takes them may
    append to `pieces`. Closing the iterator, or an error of `function`, which is raised here, ends all processes.
    """
    # Forked, so that the processes hold the locks of this one (and see its modules as they are).
    idle = [_Worker(function) for _ in range(min(workers, len(pieces)))]
    busy: dict[Connection, _Worker[P, R]] = {}
    try:
        while pieces or busy:
            while pieces and idle:
                worker = idle.pop()
                worker.begin(pieces.popleft())
                busy[worker.connection] = worker
            ready = wait(list(busy))
            for connection in [each for each in busy if each in ready]:
                worker = busy.pop(connection)
                piece, result = worker.piece, worker.result()
                idle.append(_Worker(function) if isinstance(result, Death) else worker)
                if isinstance(result, Exception):
                    raise result
                yield piece, result
    finally:
        for worker in [*idle, *busy.values()]:
            worker.end()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process works in `folder`: those of a killed run go on until they notice.

    The lock is of the open folder, which forked processes have open as well: it ends with the last of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, lambda: logger.info("waiting for the processes of another run in %s to end", folder)):
        yield


class _Worker(Generic[P, R]):
    """A process that does one piece after another."""

    piece: P

    def __init__(self, function: Callable[[P, Say], R]) -> None:
        context = multiprocessing.get_context("fork")
        self.place = RawValue(ctypes.c_int64, -1)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.place, function, os.getpid())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        # Before the next one is forked: as long as anyone else holds it, the end of this process is not seen.
        theirs.close()

    def begin(self, piece: P) -> None:
        self.piece, self.place.value = piece, -1
        with suppress(BrokenPipeError):  # it died while it had nothing to do: `result` tells
            self.connection.send(piece)

    def result(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.connection.close()
            return Death(self.process.exitcode or 0, self.place.value)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, place: Any, function: Callable[[Any, Say], Any], parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends this process
    # What decoders have to say of damaged images: Python remembers every other warning, libtiff writes to stderr.
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _limit_memory()

    def say(where: int) -> None:
        place.value = where
        _end_without(parent)

    while True:
        # A process forked later holds this one's pipe as well, so the parent's death closes nothing.
        while not connection.poll(SECONDS_BETWEEN_LOOKS):
            _end_without(parent)
        piece = connection.recv()
        try:
            result = function(piece, say)
        except Exception as error:
            error.add_note(traceback.format_exc())  # which does not travel by itself
            result = error
        connection.send(result)


def _end_without(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(1)


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        pages = int(file.read().split()[5])
    most = pages * resource.getpagesize() + MOST_MEMORY
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
