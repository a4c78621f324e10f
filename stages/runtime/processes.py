"""Ends processes: SIGTERM, time to clean up, then SIGKILL for what is left."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

AFTER_KILL = 10.0
"""Seconds to wait after SIGKILL: only what waits for a disk is left then."""
_POLL = 0.05


def end_group(leader: int, poll: Callable[[], int | None], grace: float, leader_grace: float = 0) -> None:
    """Ends a process group: SIGTERM to all, and SIGKILL to those that are left `grace` seconds later.

    Args:
        leader: its process id, which is the group's too (`start_new_session=True`).
        poll: reaps the leader and gives its exit code, None while it runs.
        grace: 0: SIGKILL at once.
        leader_grace: seconds in which SIGTERM goes to the leader alone: it may have its own way of ending the others.
    """

    def ended() -> bool:
        poll()
        return not group_lives(leader)

    if leader_grace and poll() is None:
        _signal(lambda: os.kill(leader, signal.SIGTERM))
        _wait(lambda: poll() is not None, leader_grace)
    if grace and not ended():
        _signal(lambda: os.killpg(leader, signal.SIGTERM))
        _wait(ended, grace)
    if not ended():
        _signal(lambda: os.killpg(leader, signal.SIGKILL))
        _wait(ended, AFTER_KILL)


def group_lives(leader: int) -> bool:
    """Whether a process of the group is at work. A zombie is not: in a container nobody may ever reap it."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return any(_works_in(leader, process) for process in psutil.process_iter())


def _works_in(group: int, process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False


def end_processes(processes: Sequence[psutil.Process], grace: float) -> None:
    """Ends processes of any groups: SIGTERM, and SIGKILL to those that are left `grace` seconds later."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(list(processes), timeout=grace)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=AFTER_KILL)


def _signal(send: Callable[[], None]) -> None:
    with suppress(ProcessLookupError):
        send()


def _wait(ended: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not ended() and time.monotonic() < until:
        time.sleep(_POLL)
