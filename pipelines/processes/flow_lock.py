"""One at a time: a lock of our own that dies with its holder, and whatever a killed holder left is cleared away.

Prefect's deployment concurrency keeps scheduled runs apart; this also keeps apart what is started by hand, and runs
after one that was killed hard. Such a run leaves two things behind: stages that go on without it, and a flow run that
reads `Running` for ever. Whoever takes the lock next ends the first and marks the second as crashed.
"""

import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from pipelines.environment import ROOT
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)

MARK = "SYNSET_HOLDER"
"""In the environment of every process that a holder starts, so that those it leaves behind are known."""
PATIENCE = 5.0
"""Seconds: who only clears away what a kill left (`reconcile`, every minute) has the lock for a moment, and because of
that a nightly run must not be skipped."""
GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class _Run:
    """A flow run that held the lock, and the process it is of (by its start too: numbers are used again)."""

    id: str
    pid: int
    started: float

    def process_lives(self) -> bool:
        """Whether it may still tell Prefect itself how it ended."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class BusyError(StageError):
    """Somebody else holds the lock; nothing was done."""


def folder(name: str, root: Path = ROOT) -> Path:
    """Where `name` keeps its lock and whatever it remembers between runs."""
    return root / ".synset" / name


@contextmanager
def exclusive(name: str, flow_run_id: str = "", root: Path = ROOT, patience: float = PATIENCE) -> Iterator[None]:
    """Holds the lock of `name` in this checkout.

    Args:
        patience: how many seconds it waits for whoever holds the lock just now.
        flow_run_id: of the Prefect run that holds it, to be marked as crashed should it be killed; empty outside one.

    Raises:
        BusyError: another process holds it.
    """
    with _opened(folder(name, root) / "lock") as file:
        _take(file, name, patience)
        mark = f"{name}:{root}"
        _end_leftovers(mark)
        # Written before anything is told to Prefect: whoever is killed in between leaves it to the next.
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
            _write(file, runs)  # the end of the block is the lock's: closing the file releases it


def at_work(name: str, root: Path = ROOT) -> bool:
    """Whether somebody holds the lock just now. It is not touched: who wants it at this moment must get it."""
    path = folder(name, root) / "lock"
    if not path.exists():
        return False
    with _opened(path) as file:
        return psutil.pid_exists(_read(file).get("pid") or -1)


def clear_after_kill(name: str, root: Path = ROOT) -> None:
    """Clears away what a killed holder of `name` left; does nothing while somebody holds the lock.

    Called every minute: where nothing was left the lock is not touched, for who wants it at this moment must get it.
    """
    path = folder(name, root) / "lock"
    if path.exists() and _left_something(path):
        try:
            with exclusive(name, root=root, patience=0):
                pass
        except BusyError:
            logger.debug("%s is at work", name)


def _left_something(path: Path) -> bool:
    """Whether the last holder did not give the lock back, or Prefect may not know how a run ended."""
    with _opened(path) as file:
        return _read(file).get("pid") is not None or not all(run.process_lives() for run in _runs(file))


def _opened(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Neither cut off nor appended to: what is in it is the last holder's word.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)


def _take(file: IO[bytes], name: str, patience: float) -> None:
    until = time.monotonic() + patience
    while not _taken(file):
        if time.monotonic() >= until:
            holder = _read(file).get("pid", "unknown")
            raise BusyError(f"another {name} is at work in this checkout (process {holder}); nothing was done")
        time.sleep(0.1)


def _taken(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _runs(file: IO[bytes]) -> "list[_Run]":
    return [_Run(*run) for run in _read(file).get("runs", [])]


def _read(file: IO[bytes]) -> dict[str, Any]:
    file.seek(0)
    first_line = file.read().partition(b"\n")[0]
    try:
        content = json.loads(first_line or b"{}")
    except ValueError:  # not ours
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: IO[bytes], runs: "list[_Run]", holder: int | None = None) -> None:
    # One write over the old content, whose rest is cut off after it: a kill in between leaves a line that can be read.
    file.seek(0)
    content = {"pid": holder, "runs": [[run.id, run.pid, run.started] for run in runs]}
    written = file.write(json.dumps(content).encode() + b"\n")
    file.truncate(written)


def _end_leftovers(mark: str) -> None:
    left = [process for process in psutil.process_iter() if _marked(process, mark)]
    if not left:
        return
    logger.warning("warning: ending %d processes that a killed run left behind", len(left))
    for process in left:
        _signal(process, "terminate")
    _, alive = psutil.wait_procs(left, timeout=GRACE)
    for process in alive:
        _signal(process, "kill")
    psutil.wait_procs(alive, timeout=GRACE)


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):  # gone by now, or another user's
        return False


def _signal(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return


def _marked_crashed(flow_run: str) -> bool:
    """Marks a run that was killed; Prefect itself may never learn of its end. False: it has to be tried again."""
    if not _in_reach_of_prefect():
        return False
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
    from prefect.states import Crashed

    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run).state  # type: ignore[arg-type]  # it takes a string as well
            if state is not None and not state.is_final():
                # Not forced: it is Prefect's rules that give the deployment's concurrency slot back.
                client.set_flow_run_state(flow_run, Crashed(message="killed; the next run cleared up after it"))
                logger.warning("warning: the flow run %s was killed; marked as crashed", flow_run)
    except ObjectNotFound:  # another server's, or deleted
        return True
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        logger.warning("warning: the flow run %s was killed; Prefect could not be told (%s)", flow_run, error)
        return False
    return True


def _in_reach_of_prefect() -> bool:
    """A server is named, or this is a flow run, whose API is up: starting one only for this takes half a minute."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None
