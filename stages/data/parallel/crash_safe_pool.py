"""A process pool that survives crashes; reports which task died, where in it, and by which signal.

For work that may crash its process, as a decoder does at a hostile image. `concurrent.futures` says only that some
process died, and gives up the work of all others. Work that does not crash goes to parallel_map.py.
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
Report = Callable[[int], None]
"""A process calls it to report its position in its task (a number from 0 on)."""
MOST_MEMORY = 4 * 2**30
"""Bytes that a process may take beyond what it began with. The largest image that is decoded takes half of it."""
SECONDS_BETWEEN_CHECKS = 1.0


@dataclass(frozen=True)
class Death:
    """How a process ended without a result; `position` is the last one that it reported in its task, -1: none."""

    exitcode: int
    position: int


def run_tasks(
    function: Callable[[P, Report], R], tasks: deque[P], workers: int
) -> Generator[tuple[P, R | Death], None, None]:
    """Tasks with their results, in the order in which they end; a process that died is replaced.

    Each process has one task at a time, so results do not queue up if they are taken slowly. The caller may append to
    `tasks` meanwhile. Closing the iterator ends all processes; so does an error of `function`, which is raised here.
    """
    # Forked, so that the processes hold the locks of this one (and see its modules as they are).
    idle = [_Worker(function) for _ in range(min(workers, len(tasks)))]
    busy: dict[Connection, _Worker[P, R]] = {}
    try:
        while tasks or busy:
            while tasks and idle:
                worker = idle.pop()
                worker.begin(tasks.popleft())
                busy[worker.connection] = worker
            ready = wait(list(busy))
            for connection in [each for each in busy if each in ready]:
                worker = busy.pop(connection)
                task, result = worker.task, worker.result()
                idle.append(_Worker(function) if isinstance(result, Death) else worker)
                if isinstance(result, Exception):
                    raise result
                yield task, result
    finally:
        for worker in [*idle, *busy.values()]:
            worker.end()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process works in `folder`: those of a killed run go on until they notice.

    Forked processes hold the lock too, so it ends with the last of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, lambda: logger.info("waiting for the processes of another run in %s to end", folder)):
        yield


class _Worker(Generic[P, R]):
    """A process that does one task after another."""

    task: P

    def __init__(self, function: Callable[[P, Report], R]) -> None:
        context = multiprocessing.get_context("fork")
        self.position = RawValue(ctypes.c_int64, -1)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.position, function, os.getpid())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        # Before the next one is forked: as long as anyone else holds it, the end of this process is not seen.
        theirs.close()

    def begin(self, task: P) -> None:
        self.task, self.position.value = task, -1
        with suppress(BrokenPipeError):  # it died while it had nothing to do: `result` tells
            self.connection.send(task)

    def result(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.connection.close()
            return Death(self.process.exitcode or 0, self.position.value)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, position: Any, function: Callable[[Any, Report], Any], parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends this process
    # Decoders warn of damaged images: Python would remember each other warning, and libtiff writes to stderr.
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _limit_memory()

    def report(at: int) -> None:
        position.value = at
        _end_without(parent)

    while True:
        # A process forked later holds this one's pipe as well, so the parent's death closes nothing.
        while not connection.poll(SECONDS_BETWEEN_CHECKS):
            _end_without(parent)
        task = connection.recv()
        try:
            result = function(task, report)
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
