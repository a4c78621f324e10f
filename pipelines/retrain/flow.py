"""`python -m pipelines.retrain`: fresh deliveries -> a version under review and a commit that gives it again.

Scheduled. It works in a git worktree of its own (.synset/retrain/tree), so nobody's checkout is touched. It may be
killed at any moment: until the very end neither branch nor alias has moved, and what was made by then is found by the
next run, as outputs that DVC knows, or as a commit and an unfinished version, which are completed first.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipelines import environment
from pipelines.environment import ROOT
from pipelines.notify import tell
from pipelines.processes.flow_lock import BusyError, exclusive, folder
from pipelines.processes.stage_process import Stop, run_streamed, signals_to
from pipelines.retrain.batch_list import batches, retracted, with_batch, with_retracted, without_batch
from pipelines.retrain.branch import (
    Branches,
    commit_retraining,
    interrupted,
    model_of,
    prepare,
    read_branches,
    refuse_if_checked_out,
    write_params,
)
from pipelines.retrain.deliveries import Delivery, Memory, listing, look, remembered
from pipelines.retrain.due import drifted, due, is_old, new_images, not_due
from pipelines.retrain.report import Report
from pipelines.retrain.versions import (
    IN_FORCE,
    drop,
    is_of,
    mark_retracted,
    name_commit,
    propose,
    registered,
    remove_unfinished,
)
from pipelines.retrain.worktree import (
    check_root,
    clear_locks,
    commit_of,
    contains,
    default_remote,
    is_tree,
    move_branch,
    open_tree,
    text_at,
)
from stages.params.all import check_all
from stages.params.retrain import Retrain
from stages.registry.client import enabled, is_server, tracking_uri
from stages.runtime.command import StageError
from stages.runtime.files import sha256, write_json, write_text
from stages.runtime.params_file import load_section

environment.apply()  # Prefect reads its settings when it is imported

from prefect import flow, get_run_logger, runtime, task  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.states import Cancelled, Completed, Failed, State  # noqa: E402

from pipelines.reproduce import cancelled_in_prefect, last_error, run_stage, stage_names, start_api  # noqa: E402

NAME = "retrain"
TREE = folder(NAME) / "tree"
MODEL = Path("models/finetuned/model.safetensors")
REFUSAL = Path(".synset/validation-failed")
UNDERWAY = folder(NAME) / "underway"
"""There from the moment that a version may be registered until it is finished and told of, and those that are not are
gone. It names the commit from before the branch moves to it."""
UNPUSHED = folder(NAME) / "unpushed"
"""There while the branch holds what the DVC remote may lack."""
REQUEST = folder(NAME) / "retract.json"
"""The batch to be taken back, until it is: a person decided it, so it must not be forgotten in a kill."""
T = TypeVar("T")


class StoppedError(Exception):
    """Somebody wants the flow to end."""


@dataclass(frozen=True)
class Work:
    """What all steps need."""

    settings: Retrain
    """Of the checkout: which branches. Everything else is read from the branches."""
    memory: Memory
    report: Report
    stop: Stop


@flow(name=NAME, persist_result=False)
def retrain(retract: str = "", reason: str = "") -> State[Any]:
    """Looks for deliveries and retrains if that is due; or takes the batch `retract` back, and retrains without it."""
    report = Report()
    stop = Stop(also=cancelled_in_prefect if os.environ.get("PREFECT_API_URL") else None)
    try:
        with signals_to(stop), exclusive(NAME, str(runtime.flow_run.id)):
            _check_place()
            settings = load_section("retrain", Retrain)
            _retrain(Work(settings, remembered(folder(NAME) / "memory.json"), report, stop), retract, reason)
    except BusyError as error:
        return Completed(name="Skipped", message=str(error))
    except StoppedError as stopped:
        how = f" (to withdraw the request, delete {_shown(REQUEST)})" if REQUEST.exists() else ""
        return Cancelled(message=f"{stopped}; the next run goes on from here{how}")
    except StageError as error:
        return _failed(str(error))
    except Exception as error:
        _failed(f"{type(error).__name__}: {error}")
        raise
    return Completed(message=report.line())


def _retrain(work: Work, retract: str, reason: str) -> None:
    """The whole of it, from top to bottom."""
    report = work.report
    _complete_interrupted(work)
    branches = read_branches(ROOT, work.settings)
    report.model, report.branch, report.base = branches.section("register")["name"], branches.name, branches.base
    request = _requested(work, branches, retract, reason)
    try:
        deliveries = [] if request else step("find", _find, work, branches)
        if why := _nothing_new(work, branches, deliveries, request):
            report.why = report.why or why
            return _end(work)
        step("prepare", _prepare, branches)
        deliveries, validation = _accept(work, branches, deliveries, request)
        if not step("decide", _decide, work, branches, deliveries, validation, request):
            return _end(work)
        write_text(UNDERWAY, "")
        for stage in _stages()[1]:
            _run_stage(work, stage)
        model = _registered_model(work)
        commit = step("commit", commit_retraining, TREE, _message(work, deliveries, request), model)
        _finish(work, branches.tip, commit, model)
        if request:
            step("tag", _mark, work, request["batch"])
        _end(work)
    except StageError as error:
        if not _forgotten(request):
            raise
        raise StageError(f"{error}\n{request['batch']} was not taken back; put that right and ask again") from error


# --------------------------------------------------------------------------------------------------------- the steps


def _find(work: Work, branches: Branches) -> list[Delivery]:
    """The deliveries that are new; in the report, why others are not taken."""
    log = get_run_logger()
    listed, back = batches(branches.params), list(branches.policy.retracted)
    found = look(_incoming(), listed, back, branches.rules, work.memory, partial(_digest, work))
    for name, why in found.unreadable.items():
        if work.memory.refused.get(name, {}).get("reasons") == [why]:
            work.report.left_alone[name] = f"refused before: {why}"
        else:
            _refuse(work, branches, name, [why])
    work.report.left_alone |= found.left_alone
    for delivery in found.ready:
        log.info(f"new: {delivery.name}, as batch {delivery.batch}")
    return found.ready


def _nothing_new(work: Work, branches: Branches, deliveries: list[Delivery], request: dict[str, str]) -> str:
    """Why there is nothing to do, as far as that is known without validation; else empty."""
    if request or (branches.ahead and is_old(branches.policy, branches.trained)):
        return ""
    if not deliveries:
        ahead = f"; `{branches.base}` is ahead of `{branches.name}`, and waits for the next" if branches.ahead else ""
        where = _shown(_incoming())
        return f"no new delivery in {where}{'' if _incoming().is_dir() else ', which is no folder'}{ahead}"
    # A decision that was taken on the same facts need not be taken from the images again.
    waiting = work.memory.waiting
    if waiting.get("for") != _facts(branches, deliveries):
        return ""
    if due(branches.policy, waiting["images"], waiting["drifted"], is_old(branches.policy, branches.trained)):
        return ""
    _leave_waiting(work, deliveries)
    return not_due(branches.policy, waiting["images"])


def _prepare(branches: Branches) -> None:
    prepare(ROOT, TREE, branches)
    for path in sorted((TREE / "stages/versions").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").split():
            package, _, version = line.partition("==")
            if (installed := importlib.metadata.version(package)) != version:
                raise StageError(
                    f"`{branches.name}` with `{branches.base}` wants {package} {version}, and {installed} is installed "
                    f"here; bring this checkout to `{branches.base}` and run `make setup`"
                )


def _accept(
    work: Work, branches: Branches, deliveries: list[Delivery], request: dict[str, str]
) -> tuple[list[Delivery], dict[str, Any]]:
    """Ingests, scans and validates; returns the deliveries that stay, and reports/validation.json.

    Where validation refuses, the deliveries are judged one by one, in order, for each is judged against those before.
    """
    try:
        good = _judge(work, branches, deliveries, request)
    except StageError:
        moved = [each for each in deliveries if listing(_incoming() / each.name) != each.listing]
        if not moved:
            # Files may have changed without a trace in their sizes and times: next time, all are read.
            for each in deliveries:
                work.memory.digests.pop(each.name, None)
            work.memory.save()
            raise
        work.report.left_alone |= {each.name: "still being copied: it changed while it was read" for each in moved}
        return _accept(work, branches, [each for each in deliveries if each not in moved], request)
    validation = json.loads((TREE / "reports/validation.json").read_text(encoding="utf-8"))
    work.report.accepted = {each.batch: validation["batches"][each.batch] for each in good}
    return good, validation


def _judge(work: Work, branches: Branches, deliveries: list[Delivery], request: dict[str, str]) -> list[Delivery]:
    """The deliveries that validation lets in; it ends with exactly these validated."""
    if not (stops := _validate(work, branches, deliveries, request)):
        return deliveries
    without = _validate(work, branches, [], request) if deliveries else stops
    if without:
        raise StageError(f"not fit for training, even without any new delivery: {'; '.join(without)}")
    good: list[Delivery] = []
    for delivery in deliveries:
        if len(deliveries) > 1:
            stops = _validate(work, branches, [*good, delivery], request)
        if stops:
            _refuse(work, branches, delivery.name, stops, delivery)
        else:
            good.append(delivery)
    if len(deliveries) > 1 and stops:
        _validate(work, branches, good, request)
    return good


def _validate(work: Work, branches: Branches, deliveries: list[Delivery], request: dict[str, str]) -> list[str]:
    """Every stage up to validation with these deliveries; returns why validation refuses them, if it does."""
    step("add", _list_batches, branches, deliveries, request)
    (TREE / REFUSAL / "validation.json").unlink(missing_ok=True)  # the page stays, for whom it refused
    _run_stage(work, "ingest")
    _ingest_again_what_changed(work, deliveries)
    for stage in _stages()[0][1:]:
        try:
            _run_stage(work, stage)
        except StageError:
            verdict = TREE / REFUSAL / "validation.json"
            if stage == "validate" and verdict.exists():
                return list(json.loads(verdict.read_text(encoding="utf-8"))["stops"])
            raise
    return []


def _ingest_again_what_changed(work: Work, deliveries: list[Delivery]) -> None:
    """DVC knows a batch's raw data by its name and source only: it restores that of an earlier delivery of this name,
    which was refused or waited, and has been mended or added to since."""
    for each in deliveries:
        if _digest(work, str(TREE / "data/raw/finetune" / each.batch), "--raw") != each.digest:
            get_run_logger().info(f"{each.name} has changed since it was ingested; ingesting it again")
            _run_stage(work, f"ingest@{each.batch}", force=True)


def _list_batches(branches: Branches, deliveries: list[Delivery], request: dict[str, str]) -> None:
    """params.yaml of the tree, with the new batches, or without the one that is taken back."""
    text = branches.params
    for delivery in deliveries:
        text = with_batch(text, delivery.batch, delivery.entry())
    if request:
        text = without_batch(text, request["batch"])
        text = with_retracted(text, [*retracted(text), request["batch"]])
    write_params(TREE, text)
    try:
        check_all(TREE / "params.yaml")
    except StageError as error:  # named by where a person may change it: the tree's file is written anew each time
        raise StageError(str(error).replace(str(TREE / "params.yaml"), f"{branches.base}:params.yaml")) from None


def _decide(
    work: Work, branches: Branches, deliveries: list[Delivery], validation: dict[str, Any], request: dict[str, str]
) -> bool:
    """Whether to train; why, or why not, goes into the report."""
    report, policy = work.report, branches.policy
    if request:
        report.taken_back = request["batch"]
        report.why = f"{request['batch']} was taken back{f' ({reason})' if (reason := request['reason']) else ''}"
        return True
    names = [each.batch for each in deliveries]
    images, drifting = new_images(validation, names), drifted(validation, names)
    anything = bool(names) or branches.ahead
    report.why = due(policy, images, drifting, is_old(policy, branches.trained)) if anything else ""
    if report.why:
        return True
    report.why = not_due(policy, images) if names else "no delivery that is fit for training"
    if names:
        work.memory.waiting = {"for": _facts(branches, deliveries), "images": images, "drifted": drifting}
        work.memory.save()
        _leave_waiting(work, deliveries)
    return False


def _registered_model(work: Work) -> str:
    """The sha256 of the model made, which is in the registry, also where DVC takes it for registered already."""
    model = sha256(TREE / MODEL)
    if not registered(work.report.model, model):
        _run_stage(work, "register", force=True)
    return model


def _finish(work: Work, tip: str, commit: str, model: str) -> None:
    """From the commit to the end. Whatever dies here, `_complete_interrupted` begins anew."""
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
    """What the branch holds goes to the DVC remote, if there is one; where that fails, the next run does it."""
    if not UNPUSHED.exists():
        return
    log, lines = get_run_logger(), list[str]()
    log.info("phase: push")
    code = run_streamed([sys.executable, "-m", "dvc", "push"], lines.append, work.stop, cwd=TREE, env=_environment())
    if code == 0:
        UNPUSHED.unlink()
        return
    warning = f"`dvc push` failed ({last_error(lines)}); the next run tries again"
    log.warning(warning)
    work.report.notes.append(warning)


def _mark(work: Work, batch: str) -> None:
    """Tags the versions that a batch taken back went into; the request is done with then."""
    work.report.marked = mark_retracted(work.report.model, batch)
    for version in work.report.marked:
        if set(version.aliases) & set(IN_FORCE):
            warning = f"version {version.number} is in force and was trained on {batch}: promote another"
            work.report.notes.append(warning)
            get_run_logger().warning(warning)
    REQUEST.unlink(missing_ok=True)


def _end(work: Work) -> None:
    """Nothing of this run is left open; then it is told what came of it."""
    if UNDERWAY.exists():
        for version in remove_unfinished(work.report.model):
            work.report.notes.append(f"version {version.number}, which a run that was killed had left, is removed")
    step("report", _publish, work.report)
    UNDERWAY.unlink(missing_ok=True)


def _publish(report: Report) -> None:
    uri = _environment()["MLFLOW_TRACKING_URI"]
    page = report.page(uri.rstrip("/") if is_server(uri) else "")
    create_markdown_artifact(key=NAME, markdown=page, description=report.line()[:200])
    get_run_logger().info(report.line())
    if report.worth_telling():
        tell(report.line().partition(". ")[0], page)


# ------------------------------------------------------------------------------------------- what an earlier run left


def _complete_interrupted(work: Work) -> None:
    """Finishes the retraining whose run was killed after its commit, or drops it where the branch has moved since.

    Of one that had finished, it only tells.
    """
    if not is_tree(ROOT, TREE):
        return
    clear_locks(TREE)
    branch = work.settings.branch
    tip = commit_of(ROOT, f"refs/heads/{branch}")
    start = tip or commit_of(ROOT, work.settings.base)
    left = interrupted(TREE, start) if UNDERWAY.exists() else None
    if tip and UNDERWAY.exists() and UNDERWAY.read_text(encoding="utf-8") == tip:
        _tell_of(work, tip)
    if left:
        commit, model = left
        work.report.model = yaml.safe_load(text_at(TREE, commit, "params.yaml"))["register"]["name"]
        version = registered(work.report.model, model)
        if version and (not tip or contains(ROOT, commit, tip)):
            work.report.why = "a run that was killed had made it"
            get_run_logger().info(f"completing the retraining {commit[:12]}, whose run was killed")
            _finish(work, tip, commit, model)
            return
        get_run_logger().info(f"dropping the commit {commit[:12]} of a run that was killed; `{branch}` moved since")
        if version:
            drop(version, commit)
        open_tree(ROOT, TREE, start)
    if UNPUSHED.exists() and tip:
        open_tree(ROOT, TREE, tip)
        _push(work)


def _tell_of(work: Work, commit: str) -> None:
    """The report of a retraining that was killed when all of it was done."""
    report = work.report
    report.model = yaml.safe_load(text_at(ROOT, commit, "params.yaml"))["register"]["name"]
    if version := registered(report.model, model_of(ROOT, commit)):
        report.version, report.commit, report.is_new = version, commit, is_of(version, commit)
        report.why = "a run that was killed had made it"


def _requested(work: Work, branches: Branches, retract: str, reason: str) -> dict[str, str]:
    """The batch to be taken back, and why; empty where none is. What is left to do of an earlier request is done."""
    pending = json.loads(REQUEST.read_text(encoding="utf-8")) if REQUEST.exists() else {}
    if pending and retract not in ("", pending["batch"]):
        raise StageError(f"taking back {pending['batch']} was interrupted; run this without --retract first")
    request = {"batch": retract, "reason": reason} if retract else pending
    if not request:
        return {}
    batch = request["batch"]
    if batch in batches(branches.params):
        write_json(REQUEST, request)
        return request
    if batch not in branches.policy.retracted:
        REQUEST.unlink(missing_ok=True)
        known = ", ".join(batches(branches.params))
        raise StageError(f"there is no batch {batch} in `{branches.name}` or `{branches.base}` (there are: {known})")
    work.report.taken_back, work.report.why = batch, work.report.why or "the branch is without it already"
    step("tag", _mark, work, batch)
    return {}


def _forgotten(request: dict[str, str]) -> bool:
    """A request that could not be met is not tried again by itself; one that only lacks its end is."""
    if not request or request["batch"] in retracted(text_at(ROOT, _tip(), "params.yaml")):
        return False
    REQUEST.unlink(missing_ok=True)
    return True


# -------------------------------------------------------------------------------------------------------------- details


def step(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function as a task of the flow, named in the log."""
    get_run_logger().info(f"phase: {name}")
    state = _call.with_options(name=name, task_run_name=name)(partial(function, *arguments), return_state=True)
    if state.is_cancelled():
        raise StoppedError(state.message)
    if state.name == "Refused":
        raise StageError(state.message)
    return state.result()


@task(cache_policy=NO_CACHE, persist_result=False)
def _call(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except StageError as error:  # a state of ours: Prefect would log a traceback
        return Failed(name="Refused", message=str(error))
    except StoppedError as stopped:
        return Cancelled(message=str(stopped))


def _run_stage(work: Work, stage: str, force: bool = False) -> None:
    get_run_logger().info(f"phase: {stage}")
    options = run_stage.with_options(name=stage, task_run_name=stage)
    state = options(stage, work.stop, cwd=TREE, env=_environment(), force=force, return_state=True)
    if state.is_cancelled():
        raise StoppedError(state.message)
    if not state.is_completed():
        raise StageError(state.message)


def _stages() -> tuple[list[str], list[str]]:
    """The stages up to validation, and those after it."""
    names = stage_names(TREE / "dvc.yaml")
    after = names.index("validate") + 1
    return names[:after], names[after:]


def _environment() -> dict[str, str]:
    """That of stages: the tree is no place for a registry or for deliveries, so both are named in full."""
    uri = tracking_uri()
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{ROOT / uri.removeprefix('sqlite:///')}"
    own = {"MLFLOW_TRACKING_URI": uri, "SYNSET_INCOMING": str(_incoming()), "SYNSET_UNFINISHED": NAME}
    return {**os.environ, **own, "SYNSET_PARAMS": "params.yaml"}


def _incoming() -> Path:
    return ROOT / os.environ.get("SYNSET_INCOMING", "data/incoming")


def _digest(work: Work, source: str, *options: str) -> str:
    """Of a delivery, or of raw data: reading it is a process's work."""
    lines: list[str] = []
    command = [sys.executable, "-m", "stages.data.sources.digests", *options, "--", source]  # its name may be `-x`
    code = run_streamed(command, lines.append, work.stop, cwd=ROOT, env=_environment())
    if work.stop.asked():
        raise StoppedError(work.stop.reason)
    if code or not lines:
        raise StageError(last_error(lines))
    return lines[-1]


def _refuse(work: Work, branches: Branches, name: str, reasons: list[str], delivery: Delivery | None = None) -> None:
    """Remembers why a delivery was refused, and keeps the page that shows it; unread ones are looked at every time."""
    known = {"listing": delivery.listing, "digest": delivery.digest} if delivery else {"listing": "", "digest": ""}
    work.memory.refused[name] = {**known, "rules": branches.rules, "reasons": reasons}
    work.memory.save()
    work.report.refused[name] = reasons
    get_run_logger().warning(f"refused: {name}: {'; '.join(reasons)}")
    page = TREE / REFUSAL / "validation.html"
    if delivery and page.exists():
        kept = folder(NAME) / "refused" / f"{delivery.batch}.html"
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(page, kept)
        work.report.notes.append(f"{name} in pictures: {_shown(kept)}")


def _facts(branches: Branches, deliveries: list[Delivery]) -> str:
    """Stands for everything that a decision rests on, but the clock and the policy."""
    facts = [branches.start, branches.base_tip, [[each.batch, each.digest] for each in deliveries]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _leave_waiting(work: Work, deliveries: list[Delivery]) -> None:
    work.report.left_alone |= {each.name: "waits until retraining is due" for each in deliveries}


def _message(work: Work, deliveries: list[Delivery], request: dict[str, str]) -> str:
    """Of the commit."""
    names = ", ".join(each.batch for each in deliveries)
    title = f"Retrain on {names}" if names else f"Retrain on `{work.settings.base}`"
    if request:
        title = f"Take back {request['batch']}"
    return f"{title}\n\n{work.report.why}"


def _tip() -> str:
    return commit_of(ROOT, f"refs/heads/{load_section('retrain', Retrain).branch}")


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _check_place() -> None:
    if Path.cwd().resolve() != ROOT.resolve():
        raise StageError(f"this works on the checkout {ROOT}; run it from there")
    check_root(ROOT)
    if not enabled():
        raise StageError("SYNSET_TRACKING=off, and retraining ends in the registry; unset it")


def _failed(why: str) -> State[Any]:
    """The state of a flow that failed; somebody is told."""
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
    start_api()
    state = retrain(wanted.retract, wanted.reason, return_state=True)
    if state.is_completed():
        print(state.message)
        sys.exit(1 if wanted.retract and state.name == "Skipped" else 0)
    print(f"error: {state.message}", file=sys.stderr)
    sys.exit(130 if state.is_cancelled() else 1)
