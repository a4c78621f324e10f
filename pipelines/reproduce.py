"""`python -m pipelines.reproduce`: `dvc repro` as a Prefect flow, a task a stage.

What has to run is DVC's to decide: every task calls `dvc repro` for one stage of dvc.yaml. Prefect adds the log, the
durations and the stop.
Without PREFECT_API_URL the flow brings an API of its own, whose first start takes up to half a minute.
"""

import argparse
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines import environment
from pipelines.processes.stage_process import Stop, run_streamed, signals_to
from stages.params.all import check_all
from stages.runtime.command import StageError, run

environment.apply()  # Prefect reads its settings when it is imported

from prefect import flow, get_run_logger, runtime, task  # noqa: E402
from prefect.artifacts import create_markdown_artifact, create_table_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.states import Cancelled, Completed, Failed, State  # noqa: E402

# `dvc` says these where another `dvc repro` works in the same checkout; it does not wait.
_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock|another DVC process")
# What DVC wraps around the stage's own last words.
_FRAME = re.compile(r"ERROR: failed to reproduce|.*For more information|\s*$")


# What a person could do next in a terminal; in a flow's log it is noise, and in a worktree of a flow's own it is wrong.
_HINT = re.compile(
    r"To track the changes with git|\s*git add |To enable auto staging|\s*dvc config core|Use `dvc push`"
)


def stage_names(path: Path = Path("dvc.yaml")) -> list[str]:
    """The named stages in dvc.yaml's order; a `foreach` group is one name."""
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["stages"])


@flow(name="reproduce", persist_result=False)
def reproduce() -> State[Any]:
    """Every stage of dvc.yaml in order; the first that fails, or a request to stop, ends the flow."""
    stop = Stop(also=cancelled_in_prefect if os.environ.get("PREFECT_API_URL") else None)
    durations: list[dict[str, Any]] = []
    with signals_to(stop):
        try:
            check_all()  # DVC would drop a batch with a bad name without a word
        except StageError as error:
            return Failed(message=str(error))
        for stage in stage_names():
            start = time.monotonic()
            state = run_stage.with_options(name=stage, task_run_name=stage)(stage, stop, return_state=True)
            durations.append({"stage": stage, "seconds": round(time.monotonic() - start, 1), "ended": state.message})
            if not state.is_completed():
                break
        create_table_artifact(key="durations", table=durations, description="Seconds a stage, DVC's own included")
        if not state.is_completed():
            # A new state: of the task's own, Prefect would only count that "1/1 states failed".
            return (Cancelled if state.is_cancelled() else Failed)(message=state.message)
        create_markdown_artifact(key="result", markdown=_result_table())
    return Completed(message="every stage is up to date")


@task(cache_policy=NO_CACHE, persist_result=False)
def run_stage(
    stage: str, stop: Stop, cwd: Path | None = None, env: Mapping[str, str] | None = None, force: bool = False
) -> State[Any]:
    """`dvc repro` of one stage, its output in the log.

    Args:
        cwd: the checkout; default: the working directory.
        env: the whole environment of the stage; default: this process's.
        force: also where nothing changed.

    Returns:
        Completed, Cancelled, or Failed with the stage's last error.
    """
    if stop.asked():
        return Cancelled(message=f"{stage} not started: {stop.reason}")
    logger = get_run_logger()
    lines: list[str] = []

    def on_line(line: str) -> None:
        if not _HINT.match(line):
            logger.info(line)
        lines.append(line)

    options = ["--single-item", *(["--force"] if force else [])]
    code = run_streamed([sys.executable, "-m", "dvc", "repro", *options, stage], on_line, stop, cwd=cwd, env=env)
    if stop.asked():
        return Cancelled(message=f"{stage}: {stop.reason}")
    if code != 0:
        return Failed(message=f"{stage}: {last_error(lines)}")
    return Completed(message=what_ran(lines))


def last_error(lines: list[str]) -> str:
    """What a person needs of a failed stage: its own last `error: ` to the end, else the last line not DVC's."""
    if any(_BUSY.search(line) for line in lines):
        return "another `dvc repro` is at work in this checkout; wait until it has ended, or stop it"
    if begins := [number for number, line in enumerate(lines) if line.startswith("error: ")]:
        own = itertools.takewhile(lambda line: not line.startswith("ERROR: "), lines[begins[-1] :])
        return "\n".join(own).removeprefix("error: ")
    said = [line for line in lines if not _FRAME.match(line)]
    return (said or lines or ["it ended without a word"])[-1]


def what_ran(lines: list[str]) -> str:
    """`ran`, `restored` (from DVC's run cache) or `unchanged`, as DVC said."""
    if any(line.startswith("Running stage") for line in lines):
        return "ran"
    return "restored" if any("is cached - skipping run" in line for line in lines) else "unchanged"


def _result_table() -> str:
    from pipelines.summary import summary_rows

    rows = "\n".join(f"| {name} | {value} |" for name, value in summary_rows())
    return f"| | |\n|---|---|\n{rows}\n"


def cancelled_in_prefect() -> bool:
    """Whether somebody pressed Cancel on the flow run that calls this."""
    # Nobody kills a flow that was started by hand: it has to look for itself whether somebody pressed Cancel.
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(runtime.flow_run.id).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def start_api() -> None:
    """Starts Prefect's own API, if it is to be used, out of reach of Ctrl-C: it has to write down the flow's end."""
    if not os.environ.get("PREFECT_API_URL"):
        print("starting Prefect; the first time takes up to half a minute", file=sys.stderr, flush=True)
    # A blocked signal stays blocked in child processes, also in one that installs a handler for it, as uvicorn does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            client.hello()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def main() -> None:
    """Exit code 0 if every stage is up to date, 130 if stopped, else 1."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    check_all()  # a typing error should not cost Prefect's start first
    start_api()
    state = reproduce(return_state=True)
    if state.is_completed():
        return
    print(f"error: {state.message}", file=sys.stderr)
    sys.exit(130 if state.is_cancelled() else 1)


if __name__ == "__main__":
    run(main)
