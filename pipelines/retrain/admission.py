"""Which deliveries become batches: new ones are found, ingested and validated; validation may refuse some."""

import importlib.metadata
import json
import os
import shutil
from functools import partial
from typing import Any

from pipelines.environment import ROOT
from pipelines.processes.flow_lock import folder
from pipelines.processes.flow_run import run_logger
from pipelines.retrain import steps
from pipelines.retrain.batch_list import batches, retracted, with_batch, with_retracted, without_batch
from pipelines.retrain.branch import Branches, prepare, write_params
from pipelines.retrain.deliveries import Delivery, find_deliveries
from pipelines.retrain.steps import TREE, Retraction, Work, step
from stages.params.all import check_all
from stages.runtime import layout
from stages.runtime.command import StageError

REFUSAL = TREE / layout.VALIDATION_FAILED


def find_new(work: Work, branches: Branches) -> list[Delivery]:
    """The new deliveries; the report says why others are not taken.

    Raises:
        StageError: the folder that SYNSET_INCOMING names is not there, or its store cannot be reached.
    """
    log = run_logger()
    listed, back = batches(branches.params), list(branches.policy.retracted)
    digest = partial(steps.content_digest, work)
    if os.environ.get("SYNSET_INCOMING") and not steps.incoming().exists():  # a share that is not mounted, say
        raise StageError(f"SYNSET_INCOMING is {steps.incoming()}, which is no folder; mount it, or set it right")
    found = find_deliveries(str(steps.incoming()), listed, back, branches.rules, work.memory, digest)
    for name, why in found.unreadable.items():
        if work.memory.refused.get(name, {}).get("reasons") == [why]:
            work.report.left_alone[name] = f"refused before: {why}"
        else:
            _refuse(work, branches, name, [why])
    work.report.left_alone |= found.left_alone
    for delivery in found.ready:
        log.info(f"new: {delivery.name}, as batch {delivery.batch}")
    return found.ready


def prepare_tree(branches: Branches) -> None:
    """Puts the worktree at the branch with its base merged.

    Raises:
        StageError: they cannot be merged, or want other packages than are installed here.
    """
    prepare(ROOT, TREE, branches)
    for path in sorted((TREE / layout.VERSIONS).glob("*.txt")):
        for line in path.read_text(encoding="utf-8").split():
            package, _, version = line.partition("==")
            if (installed := importlib.metadata.version(package)) != version:
                raise StageError(
                    f"`{branches.name}` with `{branches.base}` wants {package} {version}, and {installed} is installed "
                    f"here; bring this checkout to `{branches.base}` and run `make setup`"
                )


def accept(
    work: Work, branches: Branches, deliveries: list[Delivery], retraction: Retraction | None
) -> tuple[list[Delivery], dict[str, Any]]:
    """Ingests, scans and validates; returns the deliveries that validation accepts, and reports/validation.json.

    Where validation refuses, each delivery is judged by itself, in order, together with the accepted ones before it.
    """
    try:
        good = _accepted(work, branches, deliveries, retraction)
    except StageError:
        changed = [each for each in deliveries if steps.incoming().listing(each.name) != each.listing]
        if not changed:
            # Files may have changed without a trace in their sizes and times: next time, all are read.
            for each in deliveries:
                work.memory.digests.pop(each.name, None)
            work.memory.save()
            raise
        work.report.left_alone |= {each.name: "still being copied: it changed while it was read" for each in changed}
        return accept(work, branches, [each for each in deliveries if each not in changed], retraction)
    validation = json.loads((TREE / layout.VALIDATION).read_text(encoding="utf-8"))
    work.report.accepted = {each.batch: validation["batches"][each.batch] for each in good}
    return good, validation


def _accepted(
    work: Work, branches: Branches, deliveries: list[Delivery], retraction: Retraction | None
) -> list[Delivery]:
    """The deliveries that validation accepts; the last validation is one of exactly these."""
    if not (stops := _validate(work, branches, deliveries, retraction)):
        return deliveries
    without = _validate(work, branches, [], retraction) if deliveries else stops
    if without:
        raise StageError(f"not fit for training, even without any new delivery: {'; '.join(without)}")
    good: list[Delivery] = []
    for delivery in deliveries:
        if len(deliveries) > 1:
            stops = _validate(work, branches, [*good, delivery], retraction)
        if stops:
            _refuse(work, branches, delivery.name, stops, delivery)
        else:
            good.append(delivery)
    if len(deliveries) > 1 and stops:
        _validate(work, branches, good, retraction)
    return good


def _validate(work: Work, branches: Branches, deliveries: list[Delivery], retraction: Retraction | None) -> list[str]:
    """Runs every stage up to validation with these deliveries; returns why validation refuses them, if it does."""
    step("add", _list_batches, branches, deliveries, retraction)
    stops = REFUSAL / layout.VALIDATION.name
    stops.unlink(missing_ok=True)  # the page stays, for a delivery that was refused
    steps.run_stage_in_tree(work, "ingest")
    _ingest_changed_again(work, deliveries)
    for stage in steps.stages_in_tree()[0][1:]:
        try:
            steps.run_stage_in_tree(work, stage)
        except StageError:
            if stage == "validate" and stops.exists():
                return list(json.loads(stops.read_text(encoding="utf-8"))["stops"])
            raise
    return []


def _list_batches(branches: Branches, deliveries: list[Delivery], retraction: Retraction | None) -> None:
    """Writes params.yaml of the tree, with the new batches, or without the one that is taken back."""
    text = branches.params
    for delivery in deliveries:
        text = with_batch(text, delivery.batch, delivery.entry())
    if retraction:
        text = without_batch(text, retraction.batch)
        text = with_retracted(text, [*retracted(text), retraction.batch])
    write_params(TREE, text)
    path = TREE / layout.PARAMS
    try:
        check_all(path)
    except StageError as error:  # names the file that a person may change: the tree's is written anew each time
        raise StageError(str(error).replace(str(path), f"{branches.base}:{layout.PARAMS}")) from None


def _ingest_changed_again(work: Work, deliveries: list[Delivery]) -> None:
    """Ingests deliveries again that have changed since they were ingested.

    DVC identifies a batch's raw data by name and source only. It restores the data of an earlier delivery of this name,
    which was refused or waited.
    """
    for each in deliveries:
        if steps.content_digest(work, str(TREE / layout.raw("finetune", each.batch)), "--raw") != each.digest:
            run_logger().info(f"{each.name} has changed since it was ingested; ingesting it again")
            steps.run_stage_in_tree(work, f"ingest@{each.batch}", force=True)


def _refuse(work: Work, branches: Branches, name: str, reasons: list[str], delivery: Delivery | None = None) -> None:
    """Remembers why a delivery was refused, and keeps the page that shows it.

    Args:
        delivery: None for one that could not be read; it is tried again every time.
    """
    known = {"listing": delivery.listing, "digest": delivery.digest} if delivery else {"listing": "", "digest": ""}
    work.memory.refused[name] = {**known, "rules": branches.rules, "reasons": reasons}
    work.memory.save()
    work.report.refused[name] = reasons
    run_logger().warning(f"refused: {name}: {'; '.join(reasons)}")
    page = REFUSAL / layout.VALIDATION_PAGE.name
    if delivery and page.exists():
        kept = folder(steps.NAME) / "refused" / f"{delivery.batch}.html"
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(page, kept)
        work.report.notes.append(f"{name} in pictures: {steps.shown(kept)}")
