"""`python -m pipelines.retrain`: fresh deliveries -> a version under review and a commit that reproduces it.

Scheduled. It works in a git worktree of its own (.synset/retrain/tree), so nobody's checkout is touched. It may be
killed at any moment: until the very end neither branch nor alias has moved. The next run finds what was made by then,
as outputs that DVC knows, or as a commit and an unfinished version, which it completes first.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from pipelines import environment
from pipelines.environment import ROOT
from pipelines.notify import tell
from pipelines.processes.flow_lock import BusyError, exclusive, folder
from pipelines.processes.flow_run import flow_stop, run_flow
from pipelines.processes.stage_process import signals_to
from pipelines.retrain import steps
from pipelines.retrain.admission import accept, find_new, prepare_tree
from pipelines.retrain.branch import read_branches
from pipelines.retrain.completion import close, commit, complete_interrupted, finish, registered_model
from pipelines.retrain.deliveries import remembered
from pipelines.retrain.due import decide, nothing_new
from pipelines.retrain.report import Report
from pipelines.retrain.retraction import REQUEST, mark, requested, withdraw
from pipelines.retrain.steps import NAME, FlowStoppedError, Work, step
from pipelines.retrain.worktree import check_root
from stages.params.retrain import Retrain
from stages.registry.client import enabled
from stages.runtime.command import StageError
from stages.runtime.files import write_text
from stages.runtime.params_file import load_section

environment.apply()  # Prefect reads its settings when it is imported

from prefect import flow, get_run_logger, runtime  # noqa: E402
from prefect.states import Cancelled, Completed, Failed, State  # noqa: E402


@flow(name=NAME, persist_result=False)
def retrain(retract: str = "", reason: str = "") -> State[Any]:
    """Looks for deliveries and retrains if that is due; or takes the batch `retract` back, and retrains without it."""
    report = Report()
    stop = flow_stop()
    try:
        with signals_to(stop), exclusive(NAME, str(runtime.flow_run.id)):
            _check_place()
            settings = load_section("retrain", Retrain)
            _retrain(Work(settings, remembered(folder(NAME) / "memory.json"), report, stop), retract, reason)
    except BusyError as error:
        return Completed(name="Skipped", message=str(error))
    except FlowStoppedError as stopped:
        how = f" (to withdraw the request, delete {steps.shown(REQUEST)})" if REQUEST.exists() else ""
        return Cancelled(message=f"{stopped}; the next run goes on from here{how}")
    except StageError as error:
        return _failed(str(error))
    except Exception as error:
        _failed(f"{type(error).__name__}: {error}")
        raise
    return Completed(message=report.line())


def _retrain(work: Work, retract: str, reason: str) -> None:
    complete_interrupted(work)
    branches = read_branches(ROOT, work.settings)
    report = work.report
    report.model, report.branch, report.base = branches.section("register")["name"], branches.name, branches.base
    retraction = requested(work, branches, retract, reason)
    try:
        deliveries = [] if retraction else step("find", find_new, work, branches)
        if not retraction and (why := nothing_new(work, branches, deliveries)):
            report.why = report.why or why
            return close(work)
        step("prepare", prepare_tree, branches)
        deliveries, validation = accept(work, branches, deliveries, retraction)
        if not step("decide", decide, work, branches, deliveries, validation, retraction):
            return close(work)
        write_text(steps.UNDERWAY, "")
        for stage in steps.stages_in_tree()[1]:
            steps.run_stage_in_tree(work, stage)
        model = registered_model(work)
        made = step("commit", commit, work, deliveries, retraction, model)
        finish(work, branches.tip, made, model)
        if retraction:
            step("tag", mark, work, retraction.batch)
        close(work)
    except StageError as error:
        if not (retraction and withdraw(retraction)):  # withdrawn, because it would only fail again
            raise
        raise StageError(f"{error}\n{retraction.batch} was not taken back; put that right and ask again") from error


def _check_place() -> None:
    if Path.cwd().resolve() != ROOT.resolve():
        raise StageError(f"this works on the checkout {ROOT}; run it from there")
    check_root(ROOT)
    if not enabled():
        raise StageError("SYNSET_TRACKING=off, and retraining ends in the registry; unset it")


def _failed(why: str) -> State[Any]:
    """The state of a flow that failed; sends a notification."""
    message = f"{why}\nNobody's checkout was touched; what was made is kept, and the next run goes on from there"
    get_run_logger().error(message)
    tell("retraining failed", message)
    return Failed(message=message)


def main() -> None:
    """Exit code 0 where it ended well, also with nothing to do, 130 if stopped, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retract", default="", metavar="BATCH", help="take a batch back, and retrain without it")
    parser.add_argument("--reason", default="", help="why it is taken back; goes into the commit")
    wanted = parser.parse_args()
    if wanted.reason and not wanted.retract:
        parser.error("--reason says why a batch is taken back; name it by --retract")
    load_section("retrain", Retrain)  # a typing error should not cost Prefect's start first
    state = run_flow(retrain, wanted.retract, wanted.reason)
    print(state.message)
    sys.exit(1 if wanted.retract and state.name == "Skipped" else 0)
