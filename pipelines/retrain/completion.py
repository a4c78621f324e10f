"""From the trained model to the moved branch: version, commit, alias, push, report; also after a kill."""

import sys

import yaml

from pipelines import environment
from pipelines.environment import ROOT
from pipelines.notify import tell
from pipelines.processes.flow_run import last_error
from pipelines.processes.stage_process import run_streamed
from pipelines.retrain.branch import commit_retraining, interrupted, model_of, refuse_if_checked_out
from pipelines.retrain.deliveries import Delivery
from pipelines.retrain.report import Report
from pipelines.retrain.steps import (
    NAME,
    TREE,
    UNDERWAY,
    UNPUSHED,
    Retraction,
    Work,
    run_stage_in_tree,
    stage_environment,
    step,
)
from pipelines.retrain.versions import drop, is_of, name_commit, propose, registered, remove_unfinished
from pipelines.retrain.worktree import (
    clear_locks,
    commit_of,
    contains,
    default_remote,
    is_tree,
    move_branch,
    open_tree,
    text_at,
)
from stages.registry.client import is_server
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import sha256, write_text

environment.apply()  # Prefect reads its settings when it is imported

from prefect import get_run_logger  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402


def registered_model(work: Work) -> str:
    """The sha256 of the new model. It is in the registry then, even if DVC skipped `register` as unchanged."""
    model = sha256(TREE / layout.FINETUNED / layout.WEIGHTS)
    if not registered(work.report.model, model):
        run_stage_in_tree(work, "register", force=True)
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
    if default_remote(ROOT):
        UNPUSHED.touch()
    write_text(UNDERWAY, commit)
    step("branch", move_branch, ROOT, branch, commit, tip)
    report.version, report.commit, report.is_new = version, commit, is_of(version, commit)
    _push(work)


def _push(work: Work) -> None:
    """Pushes the branch's data to the DVC remote, if there is one; after a failure, the next run tries again."""
    if not UNPUSHED.exists():
        return
    log, lines = get_run_logger(), list[str]()
    log.info("phase: push")
    command = [sys.executable, "-m", "dvc", "push"]
    if run_streamed(command, lines.append, work.stop, cwd=TREE, env=stage_environment()) == 0:
        UNPUSHED.unlink()
        return
    warning = f"`dvc push` failed ({last_error(lines)}); the next run tries again"
    log.warning(warning)
    work.report.notes.append(warning)


def close(work: Work) -> None:
    """Removes unfinished versions, then publishes the report."""
    if UNDERWAY.exists():
        for version in remove_unfinished(work.report.model):
            work.report.notes.append(f"version {version.number}, which a run that was killed had left, is removed")
    step("report", _publish, work.report)
    UNDERWAY.unlink(missing_ok=True)


def _publish(report: Report) -> None:
    uri = stage_environment()["MLFLOW_TRACKING_URI"]
    page = report.page(uri.rstrip("/") if is_server(uri) else "")
    create_markdown_artifact(key=NAME, markdown=page, description=report.line()[:200])
    get_run_logger().info(report.line())
    if report.worth_telling():
        tell(report.line().partition(". ")[0], page)


def complete_interrupted(work: Work) -> None:
    """Finishes a retraining that was killed after its commit, or drops it if the branch has moved since.

    If it was killed when all was done, only its report is missing.
    """
    if not is_tree(ROOT, TREE):
        return
    clear_locks(TREE)
    log, branch = get_run_logger(), work.settings.branch
    tip = commit_of(ROOT, f"refs/heads/{branch}")
    start = tip or commit_of(ROOT, work.settings.base)
    left = interrupted(TREE, start) if UNDERWAY.exists() else None
    if tip and UNDERWAY.exists() and UNDERWAY.read_text(encoding="utf-8") == tip:
        _report_finished(work, tip)
    if left:
        commit, model = left
        work.report.model = _model_name(commit)
        version = registered(work.report.model, model)
        if version and (not tip or contains(ROOT, commit, tip)):
            work.report.why = "a run that was killed had made it"
            log.info(f"completing the retraining {commit[:12]}, whose run was killed")
            finish(work, tip, commit, model)
            return
        log.info(f"dropping the commit {commit[:12]} of a run that was killed; `{branch}` moved since")
        if version:
            drop(version, commit)
        open_tree(ROOT, TREE, start)
    if UNPUSHED.exists() and tip:
        open_tree(ROOT, TREE, tip)
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
    return str(yaml.safe_load(text_at(ROOT, commit, str(layout.PARAMS)))["register"]["name"])
