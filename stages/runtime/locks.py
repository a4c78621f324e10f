"""Locks between processes, on an open file or folder; the kernel releases them when their holder dies.

This uses filelock's `lock_descriptor`, not its `FileLock`. Forked children and processes that inherit the descriptor
hold the lock too, and the last of them releases it; `FileLock` closes its descriptor in a child. A folder can be locked
as well, and then needs no lock file; a lock file may hold text.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filelock import lock_descriptor

_POLL = 0.05


class HasDescriptor(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Its file descriptor."""


def lock(file: int | HasDescriptor, patience: float = math.inf) -> bool:
    """Locks an open file or folder until it is closed, here and in every process that inherited it.

    Args:
        file: an open file, or a descriptor.
        patience: seconds to wait for another holder; 0: do not wait.

    Returns:
        False where another process still holds it.

    Raises:
        OSError: the file system has no locks.
    """
    descriptor = file if isinstance(file, int) else file.fileno()
    until = time.monotonic() + patience
    while not lock_descriptor(descriptor, blocking=False):
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL)
    return True


@contextmanager
def locked_folder(folder: Path, on_wait: Callable[[], object] = lambda: None, optional: bool = False) -> Iterator[None]:
    """Holds the lock of an existing folder; waits until no other process does.

    Forked processes hold it too: those of a killed run keep it until they end.

    Args:
        on_wait: is called once where it has to wait.
        optional: goes on without a lock on a file system that has none.

    Raises:
        OSError: there is no such folder, or, unless `optional`, the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            if not lock(descriptor, patience=0):
                on_wait()
                lock(descriptor)
        except OSError:
            if not optional:
                raise
        yield
    finally:
        os.close(descriptor)
