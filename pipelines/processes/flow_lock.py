"""A lock per flow: one run at a time in a checkout, and what a killed run left behind is cleared away.

Prefect's deployment concurrency separates scheduled runs only; the lock also separates runs that are started by hand.
The kernel releases it when its holder dies. A killed run leaves two things behind: stages that go on without it, and a
flow run that Prefect shows as `Running` for ever. The next holder ends the first and marks the second as crashed.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from pipelines.environment import ROOT
from stages.runtime.command import StageError
from stages.runtime.locks import lock
from stages.runtime.processes import end_processes

logger = logging.getLogger(__name__)

MARK = "SYNSET_HOLDER"
"""Variable in the environment of every process that a holder starts; identifies those that it leaves behind."""
PATIENCE = 5.0
"""Seconds to wait for the lock. `reconcile`, every minute, holds it for a moment to clear up after a kill; a nightly
run must not be skipped because of that."""
GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class _Run:
    """A flow run that held the lock, and its process, known by number and start time: numbers are used again."""

    id: str
    pid: int
    started: float

    def process_lives(self) -> bool:
        """Whether it can still tell Prefect itself how it ended."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class BusyError(StageError):
    """Somebody else holds the lock; nothing was done."""


def folder(name: str, root: Path = ROOT) -> Path:
    """Where the flow `name` keeps its lock and its memory between runs."""
    return root / ".synset" / name


@contextmanager
def exclusive(name: str, flow_run_id: str = "", root: Path = ROOT, patience: float = PATIENCE) -> Iterator[None]:
    """Holds the lock of `name` in this checkout.

    Args:
        flow_run_id: the Prefect run that holds it, to be marked as crashed if it is killed; empty outside one.
        patience: seconds to wait for another holder.

    Raises:
        BusyError: another process holds it.
    """
    with _opened(folder(name, root) / "lock") as file:
        _take(file, name, patience)
        mark = f"{name}:{root}"
        _end_leftovers(mark)
        # Written before Prefect is told: after a kill in between, the next holder finds it.
        own = [_Run(flow_run_id, os.getpid(), psutil.Process().create_time())] if flow_run_id else []
        runs = [*_runs(file), *own]
        _write(file, runs, holder=os.getpid())
        runs = [run for run in runs if run.process_lives() or not _marked_crashed(run.id)]
        _write(file, runs, holder=os.getpid())
        before = os.environ.get(MARK)
        os.environ[MARK] = mark
        try:
            yield
        finally:
            os.environ.pop(MARK) if before is None else os.environ.update({MARK: before})
            # Our own run stays in the list: it can still be killed before Prefect knows how it ended.
            _write(file, runs)  # closing the file releases the lock


def at_work(name: str, root: Path = ROOT) -> bool:
    """Whether somebody holds the lock just now. Does not try it: a run that starts in this moment must get it."""
    path = folder(name, root) / "lock"
    if not path.exists():
        return False
    with _opened(path) as file:
        return psutil.pid_exists(_read(file).get("pid") or -1)


def clear_after_kill(name: str, root: Path = ROOT) -> None:
    """Clears away what a killed holder of `name` left; does nothing while somebody holds the lock.

    Called every minute. Where nothing was left the lock is not taken: a run that starts in this moment must get it.
    """
    path = folder(name, root) / "lock"
    if path.exists() and _left_something(path):
        try:
            with exclusive(name, root=root, patience=0):
                pass
        except BusyError:
            logger.debug("%s is at work", name)


def _left_something(path: Path) -> bool:
    """Whether the last holder was killed, or Prefect may not know how a run ended."""
    with _opened(path) as file:
        return _read(file).get("pid") is not None or not all(run.process_lives() for run in _runs(file))


def _opened(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened without truncation: it holds what the last holder wrote.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)


def _take(file: IO[bytes], name: str, patience: float) -> None:
    if not lock(file, patience):
        holder = _read(file).get("pid", "unknown")
        raise BusyError(f"another {name} is at work in this checkout (process {holder}); nothing was done")


def _runs(file: IO[bytes]) -> list[_Run]:
    return [_Run(*run) for run in _read(file).get("runs", [])]


def _read(file: IO[bytes]) -> dict[str, Any]:
    file.seek(0)
    first_line = file.read().partition(b"\n")[0]
    try:
        content = json.loads(first_line or b"{}")
    except ValueError:  # not ours
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: IO[bytes], runs: list[_Run], holder: int | None = None) -> None:
    # One write over the old content, then truncation: a kill in between leaves a first line that can be read.
    file.seek(0)
    content = {"pid": holder, "runs": [[run.id, run.pid, run.started] for run in runs]}
    written = file.write(json.dumps(content).encode() + b"\n")
    file.truncate(written)


def _end_leftovers(mark: str) -> None:
    # Twice: right after its start a process may not show its environment yet, and one that is asked to end may start
    # another. No more often: one that waits for a dead disk outlives any number of signals.
    for _ in range(2):
        left = [process for process in psutil.process_iter() if _has_mark(process, mark)]
        if not left:
            return
        logger.warning("warning: ending %d processes that a killed run left behind", len(left))
        end_processes(left, GRACE)


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):  # gone by now, or another user's
        return False


def _marked_crashed(flow_run: str) -> bool:
    """Marks a flow run as crashed in Prefect, which may never notice its end; False: it has to be tried again."""
    if not (os.environ.get("PREFECT_API_URL") or "prefect" in sys.modules):
        return False
    from pipelines.processes.crashed_runs import mark_crashed

    return mark_crashed(flow_run)
