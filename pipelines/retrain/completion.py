"""From the trained model to the moved branch: version, commit, alias, push, report; also after a kill."""

import sys

from pipelines.environment import ROOT
from pipelines.notify import tell
from pipelines.processes.flow_run import last_error, publish_page, run_logger
from pipelines.processes.stage_process import run_streamed
from pipelines.retrain import steps, worktree
from pipelines.retrain.branch import commit_retraining, interrupted, model_of, refuse_if_checked_out
from pipelines.retrain.deliveries import Delivery
from pipelines.retrain.report import Report
from pipelines.retrain.steps import TREE, Retraction, Work, step
from pipelines.retrain.versions import drop, is_of, name_commit, propose, registered, remove_unfinished
from pipelines.retrain.worktree import commit_of, text_at
from stages.registry.client import is_server
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import sha256, write_text
from stages.runtime.params_file import parse_params


def registered_model(work: Work) -> str:
    """The sha256 of the new model. It is in the registry then, even if DVC skipped `register` as unchanged."""
    model = sha256(TREE / layout.FINETUNED / layout.WEIGHTS)
    if not registered(work.report.model, model):
        steps.run_stage_in_tree(work, "register", force=True)
    return model


def commit(work: Work, deliveries: list[Delivery], retraction: Retraction | None, model: str) -> str:
    """Commits the retraining in the worktree, on no branch yet; returns the commit.

    Args:
        model: the sha256 of its weights.
    """
    names = ", ".join(each.batch for each in deliveries)
    title = f"Retrain on {names}" if names else f"Retrain on `{work.settings.base}`"
    if retraction:
        title = f"Take back {retraction.batch}"
    return commit_retraining(TREE, f"{title}\n\n{work.report.why}", model)


def finish(work: Work, tip: str, commit: str, model: str) -> None:
    """Finishes the version, gives it its alias, moves the branch and pushes.

    After a kill in here, `complete_interrupted` of the next run does all of it again.

    Args:
        tip: the commit that the branch must still be at.

    Raises:
        StageError: the branch was moved or checked out, or the version is gone.
    """
    report, branch = work.report, work.settings.branch
    version = registered(report.model, model)
    if version is None:
        raise StageError(f"{report.model}: the version just registered is gone; run this again")
    refuse_if_checked_out(ROOT, TREE, branch)
    if commit_of(ROOT, f"refs/heads/{branch}") != tip:
        raise StageError(f"somebody moved the branch `{branch}` meanwhile; the next run begins where it is now")
    step("tag", name_commit, version, commit)
    step("alias", propose, version, commit)
    if worktree.default_remote(ROOT):
        steps.UNPUSHED.touch()
    write_text(steps.UNDERWAY, commit)
    step("branch", worktree.move_branch, ROOT, branch, commit, tip)
    report.version, report.commit, report.is_new = version, commit, is_of(version, commit)
    _push(work)


def _push(work: Work) -> None:
    """Pushes the branch's data to the DVC remote, if there is one; after a failure, the next run tries again."""
    if not steps.UNPUSHED.exists():
        return
    log, lines = run_logger(), list[str]()
    log.info("phase: push")
    command = [sys.executable, "-m", "dvc", "push"]
    if run_streamed(command, lines.append, work.stop, cwd=TREE, env=steps.stage_environment()) == 0:
        steps.UNPUSHED.unlink()
        return
    warning = f"`dvc push` failed ({last_error(lines)}); the next run tries again"
    log.warning(warning)
    work.report.notes.append(warning)


def close(work: Work) -> None:
    """Removes unfinished versions, then publishes the report."""
    if steps.UNDERWAY.exists():
        for version in remove_unfinished(work.report.model):
            work.report.notes.append(f"version {version.number}, which a run that was killed had left, is removed")
    step("report", _publish, work.report)
    steps.UNDERWAY.unlink(missing_ok=True)


def _publish(report: Report) -> None:
    uri = steps.stage_environment()["MLFLOW_TRACKING_URI"]
    page = report.page(uri.rstrip("/") if is_server(uri) else "")
    publish_page(key=steps.NAME, markdown=page, description=report.line()[:200])
    run_logger().info(report.line())
    if report.worth_telling():
        tell(report.line().partition(". ")[0], page)


def complete_interrupted(work: Work) -> None:
    """Finishes a retraining that was killed after its commit, or drops it if the branch has moved since.

    If it was killed when all was done, only its report is missing.
    """
    if not worktree.is_tree(ROOT, TREE):
        return
    worktree.clear_locks(TREE)
    log, branch = run_logger(), work.settings.branch
    tip = commit_of(ROOT, f"refs/heads/{branch}")
    start = tip or commit_of(ROOT, work.settings.base)
    left = interrupted(TREE, start) if steps.UNDERWAY.exists() else None
    if tip and steps.UNDERWAY.exists() and steps.UNDERWAY.read_text(encoding="utf-8") == tip:
        _report_finished(work, tip)
    if left:
        commit, model = left
        work.report.model = _model_name(commit)
        version = registered(work.report.model, model)
        if version and (not tip or worktree.contains(ROOT, commit, tip)):
            work.report.why = "a run that was killed had made it"
            log.info(f"completing the retraining {commit[:12]}, whose run was killed")
            finish(work, tip, commit, model)
            return
        log.info(f"dropping the commit {commit[:12]} of a run that was killed; `{branch}` moved since")
        if version:
            drop(version, commit)
        worktree.open_tree(ROOT, TREE, start)
    if steps.UNPUSHED.exists() and tip:
        worktree.open_tree(ROOT, TREE, tip)
        _push(work)


def _report_finished(work: Work, commit: str) -> None:
    """Fills the report of a retraining that was killed when all of it was done."""
    report = work.report
    report.model = _model_name(commit)
    if version := registered(report.model, model_of(ROOT, commit)):
        report.version, report.commit, report.is_new = version, commit, is_of(version, commit)
        report.why = "a run that was killed had made it"


def _model_name(commit: str) -> str:
    """The name of the registered model in a commit's params.yaml."""
    text = text_at(ROOT, commit, str(layout.PARAMS))
    return str(parse_params(text, f"{commit[:12]}:{layout.PARAMS}")["register"]["name"])
