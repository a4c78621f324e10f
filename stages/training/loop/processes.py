"""Several processes, one a GPU, that train together through torch.distributed.

A step's batch is divided among them, gradients are averaged (DDP), and process 0 alone writes, logs and saves
checkpoints.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist

from stages.params.training.training import Training


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def run_together(module: str, arguments: Sequence[str], training: Training, main: Callable[[], None]) -> None:
    """Calls `main`, here or in `training.world_size` processes.

    Args:
        module: the stage's, which the processes run again: `stages.pretrain`.
        arguments: its command line.

    Raises:
        StageError: the error of the process that failed first.
    """
    member = "TORCHELASTIC_RUN_ID" in os.environ
    if training.world_size == 1 and not member:
        main()
        return
    from stages.training.loop.launching import launch, run_member  # takes a quarter of a second

    if member:
        run_member(training, main)
    else:
        launch(module, arguments, training)


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """The plain values or tensors (on the CPU) of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(module: torch.nn.Module) -> None:
    """Gives every process the running statistics of process 0; they come from its batches alone."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def wait_for_first() -> None:
    """Returns when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


class StopSignals:
    """Notes SIGTERM and SIGINT while it is open; the caller checks `came` and acts.

    A second signal ends the process at once, unless it is one of several: those get the same stop from the terminal
    and from their launcher.
    """

    def __init__(self) -> None:
        self.came = 0
        """The first signal's number."""
        self._at_once = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where nothing would be lost, a signal ends process 0 at once."""
        self._at_once = is_first()
        try:
            if self.came and self._at_once:
                sys.exit(128 + self.came)
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _frame: object) -> None:
        again, self.came = bool(self.came), self.came or number
        if self._at_once or (again and world_size() == 1):
            sys.exit(128 + number)
