"""Starts the processes of one training through torchrun's launcher, and reports the first that failed."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.params.training.training import Training
from stages.runtime.command import StageError

RENDEZVOUS = "SYNSET_RENDEZVOUS"
"""host:port of the first machine, where there are several."""
RESTARTS = "SYNSET_RESTARTS"
"""How often the processes are started again by themselves after one of them died."""
PR_SET_PDEATHSIG = 1
"""prctl(2)."""
HERE = "localhost"
"""Where the processes of one machine meet. By default that is the machine's own name, and where no resolver knows this
(a container) they would wait for each other for half an hour."""


def launch(module: str, arguments: Sequence[str], training: Training) -> None:
    """Starts the processes on this machine and waits for them.

    Args:
        module: what each process runs: `stages.pretrain`.
        arguments: its command line.

    Raises:
        StageError: the error of the process that failed first.
    """
    _check_devices(training)
    meeting = os.environ.get(RENDEZVOUS)
    if training.nodes > 1 and not meeting:
        raise StageError(
            f"params.yaml: `training.nodes` is {training.nodes}: set {RENDEZVOUS} to host:port of the first machine, "
            "the same on all of them (docs/scale-out.md)"
        )
    config = LaunchConfig(
        min_nodes=training.nodes,
        max_nodes=training.nodes,
        nproc_per_node=training.world_size // training.nodes,
        run_id=f"{module}-{os.getppid()}" if not meeting else module,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting or f"{HERE}:0",
        local_addr=HERE if training.nodes == 1 else None,
        max_restarts=_restarts(),
        monitor_interval=0.2,
    )
    # Each process has `training.threads`; if this were unset, the launcher would warn and choose one.
    os.environ.setdefault("OMP_NUM_THREADS", str(training.threads))
    if training.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of things that we do on purpose
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its tables repeat our one message
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        raise _first_failure(failed) from None


def _restarts() -> int:
    restarts = os.environ.get(RESTARTS) or "0"
    if not restarts.isdecimal():
        raise StageError(f"{RESTARTS} must be a number of restarts, got {restarts!r}")
    return int(restarts)


def _first_failure(failed: ChildFailedError) -> Exception:
    """The first error: a process that was killed comes before those that lost their connection to it."""
    killed = {rank: failure.exitcode for rank, failure in failed.failures.items() if failure.exitcode < 0}
    for process, code in killed.items():
        if code != -signal.SIGTERM:  # the launcher sends it to the processes that are left
            name = signal.Signals(-code).name
            return StageError(
                f"process {process} was killed by {name}; run again: training goes on from its last checkpoint"
            )
    process, failure = failed.get_first_failure()
    if failure.exitcode - 128 in (signal.SIGTERM, signal.SIGINT):  # a process that saved a checkpoint first ends so
        name = signal.Signals(failure.exitcode - 128).name
        return StageError(f"process {process} was stopped by {name}; run again: training goes on from its checkpoint")
    # `record` has written it; a plain string where the process did not get that far.
    message: Any = failure.message
    whole = isinstance(message, dict)
    words, details = (message["message"], message["extraInfo"]["py_callstack"]) if whole else (message, message)
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


def run_member(training: Training, main: Callable[[], None]) -> None:
    """Calls `main` as one of the processes; its error goes to the launcher, which prints the first one."""
    _die_with_parent()
    started = int(os.environ["WORLD_SIZE"])
    if started != training.world_size:
        raise StageError(
            f"{started} processes were started, but `training.world_size` in params.yaml is {training.world_size}; "
            "set it to that: it decides bytes"
        )
    if int(os.environ["RANK"]):
        logging.getLogger().setLevel(logging.WARNING)  # process 0 logs for all
        os.environ["SYNSET_TRACKING"] = "off"
    try:
        record(_joined)(training, main)
    except Exception:
        # At once: a reader that is left in the middle of an epoch prints errors when it ends.
        sys.stderr.flush()
        os._exit(1)


def _die_with_parent() -> None:
    """A killed launcher must not leave processes behind: they would write where the next ones write."""
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it ended before the call
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
