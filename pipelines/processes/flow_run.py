"""What the flows share: a stage as a Prefect task, a command's output in the flow's log, start and end of a run.

Without PREFECT_API_URL a flow brings an API of its own, whose first start takes up to half a minute.
"""

import itertools
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines import environment
from pipelines.processes.stage_process import Stop, run_streamed
from stages.runtime.command import StageError

environment.apply()  # Prefect reads its settings when it is imported

from prefect import Flow, get_run_logger, runtime, task  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.states import Cancelled, Completed, Failed, State  # noqa: E402

# For modules of a flow that need nothing else of Prefect.
run_logger, publish_page = get_run_logger, create_markdown_artifact

# `dvc` prints these where another `dvc repro` works in the same checkout; it does not wait.
_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock|another DVC process")
# What DVC prints after the stage's own error.
_FRAME = re.compile(r"ERROR: failed to reproduce|.*For more information|\s*$")
# DVC's advice for a terminal. In a flow's log it is noise, and in a flow's own worktree it is wrong.
_HINT = re.compile(
    r"To track the changes with git|\s*git add |To enable auto staging|\s*dvc config core|Use `dvc push`"
)


def flow_stop() -> Stop:
    """A stop that a signal asks for, or Cancel in Prefect where a server is named."""
    return Stop(also=_cancelled_in_prefect if os.environ.get("PREFECT_API_URL") else None)


def _cancelled_in_prefect() -> bool:
    """Whether somebody pressed Cancel on the flow run that calls this."""
    # Prefect kills only runs that it started itself: a flow started by hand has to ask.
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(runtime.flow_run.id).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def run_flow(flow: Flow[..., State[Any]], *arguments: Any) -> State[Any]:
    """Runs a flow from a command; returns its last state, which is Completed.

    Raises:
        SystemExit: it did not complete. Its message is printed; the code is 130 if it was stopped, else 1.
    """
    _start_api()
    state = flow(*arguments, return_state=True)
    if not state.is_completed():
        print(f"error: {state.message}", file=sys.stderr)
        sys.exit(130 if state.is_cancelled() else 1)
    return state


def _start_api() -> None:
    """Starts Prefect's own API, if it is to be used, out of reach of Ctrl-C: it has to record how the flow ends."""
    if not os.environ.get("PREFECT_API_URL"):
        print("starting Prefect; the first time takes up to half a minute", file=sys.stderr, flush=True)
    # A blocked signal stays blocked in child processes, also in one that installs a handler for it, as uvicorn does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            client.hello()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def stage_names(path: Path = Path("dvc.yaml")) -> list[str]:
    """The named stages in dvc.yaml's order; a `foreach` group is one name."""
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["stages"])


@task(cache_policy=NO_CACHE, persist_result=False)
def run_stage(
    stage: str, stop: Stop, cwd: Path | None = None, env: Mapping[str, str] | None = None, force: bool = False
) -> State[Any]:
    """`dvc repro` of one stage, its output in the log.

    Args:
        cwd: the checkout; default: the working directory.
        env: the whole environment of the stage; default: this process's.
        force: run it even if nothing changed.

    Returns:
        Completed, Cancelled, or Failed with the stage's last error.
    """
    if stop.requested():
        return Cancelled(message=f"{stage} not started: {stop.reason}")
    options = ["--single-item", *(["--force"] if force else [])]
    code, lines = _logged([sys.executable, "-m", "dvc", "repro", *options, stage], stop, cwd, env)
    if stop.requested():
        return Cancelled(message=f"{stage}: {stop.reason}")
    if code != 0:
        return Failed(message=f"{stage}: {last_error(lines)}")
    return Completed(message=what_ran(lines))


def run_logged(
    command: Sequence[str], stop: Stop, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> list[str]:
    """Runs a command from within a flow, as `run_streamed` does, its output in the log; returns its lines.

    Raises:
        StageError: it failed, with its own last error; or it was stopped.
    """
    code, lines = _logged(command, stop, cwd, env)
    if stop.requested():
        raise StageError(str(stop.reason))
    if code:
        raise StageError(last_error(lines))
    return lines


def _logged(
    command: Sequence[str], stop: Stop, cwd: Path | None, env: Mapping[str, str] | None
) -> tuple[int, list[str]]:
    logger = get_run_logger()
    lines: list[str] = []

    def on_line(line: str) -> None:
        if not _HINT.match(line):
            logger.info(line)
        lines.append(line)

    return run_streamed(command, on_line, stop, cwd=cwd, env=env), lines


def last_error(lines: list[str]) -> str:
    """What a person needs of a failed stage: from its last `error: ` to the end, else the last line not DVC's."""
    if any(_BUSY.search(line) for line in lines):
        return "another `dvc repro` is at work in this checkout; wait until it has ended, or stop it"
    if begins := [number for number, line in enumerate(lines) if line.startswith("error: ")]:
        own = itertools.takewhile(lambda line: not line.startswith("ERROR: "), lines[begins[-1] :])
        return "\n".join(own).removeprefix("error: ")
    relevant = [line for line in lines if not _FRAME.match(line)]
    return (relevant or lines or ["it ended without a word"])[-1]


def what_ran(lines: list[str]) -> str:
    """`ran`, `restored` (from DVC's run cache) or `unchanged`, as DVC reported."""
    if any(line.startswith("Running stage") for line in lines):
        return "ran"
    return "restored" if any("is cached - skipping run" in line for line in lines) else "unchanged"
