"""Taking a batch back: the request survives a kill, and every version that was trained on the batch is tagged."""

import json

from pipelines.environment import ROOT
from pipelines.processes.flow_lock import folder
from pipelines.processes.flow_run import run_logger
from pipelines.retrain.batch_list import batches, retracted
from pipelines.retrain.branch import Branches
from pipelines.retrain.steps import NAME, Retraction, Work, step
from pipelines.retrain.versions import mark_retracted
from pipelines.retrain.worktree import commit_of, text_at
from stages.params.retrain import Retrain
from stages.registry.tags import IN_FORCE
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import write_json
from stages.runtime.params_file import load_section

REQUEST = folder(NAME) / "retract.json"
"""The batch to be taken back, until it is: a person decided it, so a kill must not lose it."""


def requested(work: Work, branches: Branches, retract: str, reason: str) -> Retraction | None:
    """The batch to be taken back; None where there is none. Where only the tags of versions are missing, sets them.

    Args:
        retract: the batch that this run was asked to take back, or empty.

    Raises:
        StageError: there is no such batch, or another one has to be taken back first.
    """
    pending = json.loads(REQUEST.read_text(encoding="utf-8")) if REQUEST.exists() else {}
    if pending and retract not in ("", pending["batch"]):
        raise StageError(f"taking back {pending['batch']} was interrupted; run this without --retract first")
    request = {"batch": retract, "reason": reason} if retract else pending
    if not request:
        return None
    batch = request["batch"]
    if batch in batches(branches.params):
        write_json(REQUEST, request)
        return Retraction(**request)
    if batch not in branches.policy.retracted:
        REQUEST.unlink(missing_ok=True)
        known = ", ".join(batches(branches.params))
        raise StageError(f"there is no batch {batch} in `{branches.name}` or `{branches.base}` (there are: {known})")
    work.report.taken_back, work.report.why = batch, work.report.why or "the branch is without it already"
    step("tag", mark, work, batch)
    return None


def mark(work: Work, batch: str) -> None:
    """Tags the versions that were trained on the batch; the request is completed by that."""
    work.report.marked = mark_retracted(work.report.model, batch)
    for version in work.report.marked:
        if set(version.aliases) & set(IN_FORCE):
            warning = f"version {version.number} is in force and was trained on {batch}: promote another"
            work.report.notes.append(warning)
            run_logger().warning(warning)
    REQUEST.unlink(missing_ok=True)


def withdraw(retraction: Retraction) -> bool:
    """Withdraws a request that failed, and returns True; keeps one whose commit exists, which only lacks its tags."""
    tip = commit_of(ROOT, f"refs/heads/{load_section('retrain', Retrain).branch}")
    if retraction.batch in retracted(text_at(ROOT, tip, str(layout.PARAMS))):
        return False
    REQUEST.unlink(missing_ok=True)
    return True
