"""What the steps of a retraining share: its state, its worktree, and how a step becomes a task of the flow."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipelines import environment
from pipelines.environment import ROOT
from pipelines.processes.flow_lock import folder
from pipelines.processes.flow_run import last_error, run_stage, stage_names
from pipelines.processes.stage_process import Stop, run_streamed
from pipelines.retrain.deliveries import Memory
from pipelines.retrain.incoming import Incoming, incoming_at
from pipelines.retrain.report import Report
from stages.params.retrain import Retrain
from stages.registry.client import SQLITE, tracking_uri
from stages.runtime import layout
from stages.runtime.command import StageError

environment.apply()  # Prefect reads its settings when it is imported

from prefect import get_run_logger, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.states import Cancelled, Failed  # noqa: E402

NAME = "retrain"
TREE = folder(NAME) / "tree"
UNDERWAY = folder(NAME) / "underway"
"""Exists from the moment that a version may be registered until it is finished and notified, and unfinished ones are
removed. It holds the commit as soon as the branch may move to it."""
UNPUSHED = folder(NAME) / "unpushed"
"""Exists while the branch holds something that the DVC remote may lack."""
T = TypeVar("T")


class FlowStoppedError(Exception):
    """Somebody wants the flow to end."""


@dataclass(frozen=True)
class Work:
    """What all steps need."""

    settings: Retrain
    """Those of the checkout: which branches. Everything else is read from the branches."""
    memory: Memory
    report: Report
    stop: Stop


@dataclass(frozen=True)
class Retraction:
    """A batch that a person takes back."""

    batch: str
    reason: str


def step(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function as a task of the flow, named in the log."""
    get_run_logger().info(f"phase: {name}")
    state = _call.with_options(name=name, task_run_name=name)(partial(function, *arguments), return_state=True)
    if state.is_cancelled():
        raise FlowStoppedError(state.message)
    if state.name == "Refused":
        raise StageError(state.message)
    return state.result()


@task(cache_policy=NO_CACHE, persist_result=False)
def _call(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except StageError as error:  # a state of ours: Prefect would log a traceback
        return Failed(name="Refused", message=str(error))
    except FlowStoppedError as stopped:
        return Cancelled(message=str(stopped))


def run_stage_in_tree(work: Work, stage: str, force: bool = False) -> None:
    """Runs a stage in the worktree, as a task of the flow.

    Raises:
        StageError: it failed.
        FlowStoppedError: the flow is to stop.
    """
    get_run_logger().info(f"phase: {stage}")
    options = run_stage.with_options(name=stage, task_run_name=stage)
    state = options(stage, work.stop, cwd=TREE, env=stage_environment(), force=force, return_state=True)
    if state.is_cancelled():
        raise FlowStoppedError(state.message)
    if not state.is_completed():
        raise StageError(state.message)


def stages_in_tree() -> tuple[list[str], list[str]]:
    """The stages up to validation, and those after it."""
    names = stage_names(TREE / layout.DVC_YAML)
    after = names.index("validate") + 1
    return names[:after], names[after:]


def content_digest(work: Work, source: str, *options: str) -> str:
    """The digest of a delivery's contents, or of raw data; a process of its own reads them.

    Raises:
        StageError: they cannot be read.
        FlowStoppedError: the flow is to stop.
    """
    lines: list[str] = []
    command = [sys.executable, "-m", "stages.data.sources.digests", *options, "--", source]  # its name may be `-x`
    code = run_streamed(command, lines.append, work.stop, cwd=ROOT, env=stage_environment())
    if work.stop.requested():
        raise FlowStoppedError(work.stop.reason)
    if code or not lines:
        raise StageError(last_error(lines))
    return lines[-1]


def stage_environment() -> dict[str, str]:
    """The environment of stages in the worktree, where neither registry nor deliveries lie: both are named in full."""
    uri = tracking_uri()
    if uri.startswith(SQLITE):
        uri = f"{SQLITE}{ROOT / uri.removeprefix(SQLITE)}"
    own = {"MLFLOW_TRACKING_URI": uri, "SYNSET_INCOMING": str(incoming()), "SYNSET_UNFINISHED": NAME}
    return {**os.environ, **own, "SYNSET_PARAMS": str(layout.PARAMS)}


def incoming() -> Incoming:
    """The folder or URL of deliveries."""
    return incoming_at(layout.incoming(), ROOT)


def shown(path: Path | str) -> str:
    """A path relative to the checkout, if it lies there; a URL as it is."""
    if "://" in (path := str(path)):
        return path
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
