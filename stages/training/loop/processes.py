"""Several processes, one a GPU, that train together: started through torchrun's launcher, joined by torch.distributed.

A step's batch is shared out, gradients are averaged (DDP), and process 0 alone writes, logs and keeps checkpoints.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from stages.params.training.training import Training
from stages.runtime.command import StageError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

logger = logging.getLogger(__name__)
RENDEZVOUS = "SYNSET_RENDEZVOUS"
"""host:port of the first machine, where there are several."""
RESTARTS = "SYNSET_RESTARTS"
"""How often the processes are started again by themselves after one of them died."""
PR_SET_PDEATHSIG = 1
"""prctl(2)."""
HERE = "localhost"
"""Where the processes of one machine meet. By default that is the machine's own name, and where no resolver knows this
(a container) they would wait for each other for half an hour."""


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def run_together(module: str, arguments: Sequence[str], training: Training, main: Callable[[], None]) -> None:
    """Calls `main`: here, where `training.world_size` is 1, else in as many processes as that.

    Args:
        module: the stage's, which the processes run again: `stages.pretrain`.
        arguments: of its command line.

    Raises:
        StageError: of the first process that failed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _member(training, main)
    elif training.world_size == 1:
        main()
    else:
        _launch(module, arguments, training)


def _launch(module: str, arguments: Sequence[str], training: Training) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check_devices(training)
    meeting = os.environ.get(RENDEZVOUS)
    if training.nodes > 1 and not meeting:
        raise StageError(
            f"params.yaml: `training.nodes` is {training.nodes}: set {RENDEZVOUS} to host:port of the first machine, "
            "the same on all of them (docs/scale-out.md)"
        )
    config = LaunchConfig(
        min_nodes=training.nodes, max_nodes=training.nodes, nproc_per_node=training.world_size // training.nodes,
        run_id=f"{module}-{os.getppid()}" if not meeting else module, rdzv_backend="c10d",
        rdzv_endpoint=meeting or f"{HERE}:0", local_addr=HERE if training.nodes == 1 else None,
        max_restarts=_restarts(), monitor_interval=0.2,
    )  # fmt: skip
    # Threads are torch's of each process (`training.threads`); unset, the launcher would warn and choose one.
    os.environ.setdefault("OMP_NUM_THREADS", str(training.threads))
    if training.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are of what we do on purpose
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its tables say what our one message says
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        raise _first_failure(failed) from None


def _restarts() -> int:
    wanted = os.environ.get(RESTARTS) or "0"
    if not wanted.isdecimal():
        raise StageError(f"{RESTARTS} must be a number of restarts, got {wanted!r}")
    return int(wanted)


def _first_failure(failed: "ChildFailedError") -> Exception:
    """What went wrong first: a process that was killed, before those that lost their connection to it."""
    killed = {rank: each.exitcode for rank, each in failed.failures.items() if each.exitcode < 0}
    for process, code in killed.items():
        if code != -signal.SIGTERM:  # the launcher's own word to those that are left
            name = signal.Signals(-code).name
            return StageError(
                f"process {process} was killed by {name}; run again: training goes on from its last checkpoint"
            )
    process, failure = failed.get_first_failure()
    if failure.exitcode - 128 in (signal.SIGTERM, signal.SIGINT):  # as a process ends that keeps a checkpoint first
        name = signal.Signals(failure.exitcode - 128).name
        return StageError(f"process {process} was stopped by {name}; run again: training goes on from its checkpoint")
    # What `record` has written; a plain string where the process did not get that far.
    told: Any = failure.message
    words, details = (told["message"], told["extraInfo"]["py_callstack"]) if isinstance(told, dict) else (told, told)
    if words.startswith("StageError: "):
        return StageError(words.removeprefix("StageError: "))
    return RuntimeError(f"process {process}: {details}")


def _check_devices(training: Training) -> None:
    here, there = training.world_size // training.nodes, torch.cuda.device_count()
    if training.device != "cpu" and 0 < there < here:
        raise StageError(
            f"params.yaml: `training.world_size` is {training.world_size} on {training.nodes} machines, but this one "
            f"has {there} GPUs; lower it, or set `training.device` to cpu"
        )


def _member(training: Training, main: Callable[[], None]) -> None:
    """One of the processes. What goes wrong is told to the launcher, which prints what went wrong first."""
    _die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import record

    started = int(os.environ["WORLD_SIZE"])
    if started != training.world_size:
        raise StageError(
            f"{started} processes were started, but `training.world_size` in params.yaml is {training.world_size}; "
            "set it to that: it decides bytes"
        )
    if int(os.environ["RANK"]):
        logging.getLogger().setLevel(logging.WARNING)  # process 0 says it all
        os.environ["SYNSET_TRACKING"] = "off"
    try:
        record(_joined)(training, main)
    except Exception:
        # At once: a reader that is left in the middle of an epoch complains of how it ends.
        sys.stderr.flush()
        os._exit(1)


def _die_with_parent() -> None:
    """A launcher that is killed must not leave processes behind, which would write where the next ones do."""
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it went before this was said
        os.kill(os.getpid(), signal.SIGKILL)


def _joined(training: Training, main: Callable[[], None]) -> None:
    on_gpu = training.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        main()
    finally:
        dist.destroy_process_group()


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """A plain value or tensor of every process, in their order; on the CPU."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(module: torch.nn.Module) -> None:
    """Gives every process the running statistics of process 0, whose batches alone they are of."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def wait_for_first() -> None:
    """Returns when process 0 has come here too."""
    if dist.is_initialized():
        dist.barrier()


class StopSignals:
    """SIGTERM and SIGINT while it is open: noted, and acted upon when the caller looks.

    A second one, from somebody who cannot wait, ends at once; but not one of several processes, which get the same stop
    from the terminal and from their launcher.
    """

    def __init__(self) -> None:
        self.came = 0
        """The first signal's number."""
        self._at_once = False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where nothing would be lost by it, process 0 does not wait for anybody to look."""
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
