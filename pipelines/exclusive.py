"""One at a time: a lock of our own that dies with its holder, and whatever a killed holder left is cleared away.

Prefect's deployment concurrency keeps scheduled runs apart; this also keeps apart what is started by hand, and runs
after one that was killed hard. Such a run leaves two things behind: stages that go on without it, and a flow run that
reads `Running` for ever. Whoever takes the lock next ends the first and marks the second as crashed.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from pipelines.environment import ROOT
from stages.command import StageError

logger = logging.getLogger(__name__)

MARK = "SYNSET_HOLDER"
"""In the environment of every process that a holder starts, so that those it leaves behind are known."""
GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL."""


class BusyError(StageError):
    """Somebody else holds the lock; nothing was done."""


def folder(name: str, root: Path = ROOT) -> Path:
    """Where `name` keeps its lock and whatever it remembers between runs."""
    return root / ".synset" / name


@contextmanager
def exclusive(name: str, flow_run_id: str = "", root: Path = ROOT) -> Iterator[None]:
    """Holds the lock of `name` in this checkout.

    Args:
        flow_run_id: of the Prefect run that holds it, to be marked as crashed should it be killed; empty outside one.

    Raises:
        BusyError: another process holds it.
    """
    folder(name, root).mkdir(parents=True, exist_ok=True)
    with (folder(name, root) / "lock").open("a+", encoding="utf-8") as file:
        _take(file, name)
        mark = f"{name}:{root}"
        _end_leftovers(mark)
        _mark_crashed(_read(file).get("flow_run", ""), flow_run_id)
        _write(file, {"pid": os.getpid(), "flow_run": flow_run_id})
        before = os.environ.get(MARK)
        os.environ[MARK] = mark
        try:
            yield
        finally:
            os.environ.pop(MARK) if before is None else os.environ.update({MARK: before})
            _write(file, {})  # the end of the block is the lock's: closing the file releases it


def clear_after_kill(name: str, root: Path = ROOT) -> None:
    """Clears away what a killed holder of `name` left; does nothing while somebody holds the lock."""
    if (folder(name, root) / "lock").exists():
        try:
            with exclusive(name, root=root):
                pass
        except BusyError:
            logger.debug("%s is at work", name)


def _take(file: IO[str], name: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read(file).get("pid", "unknown")
        raise BusyError(f"another {name} is at work in this checkout (process {holder}); nothing was done") from None


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        content = json.loads(file.read() or "{}")
    except ValueError:  # killed in the middle of writing it
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: IO[str], content: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(content))
    file.flush()


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


def _mark_crashed(flow_run: str, own: str) -> None:
    """The run that held the lock and never gave it back. Prefect itself may never learn of its end."""
    if not flow_run or flow_run == own or not os.environ.get("PREFECT_API_URL"):
        return
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(flow_run).state  # type: ignore[arg-type]  # it takes a string as well
        except ObjectNotFound:
            return
        if state is not None and not state.is_final():
            # Not forced: it is Prefect's rules that give the deployment's concurrency slot back.
            client.set_flow_run_state(flow_run, Crashed(message="killed; the next run cleared up after it"))
            logger.warning("warning: the flow run %s was killed; marked as crashed", flow_run)
