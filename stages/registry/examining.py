"""Examines a registered version: is it what was registered, and does its verdict hold against what is in force?"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stages.evaluation.gate import Verdict
from stages.evaluation.predictions import version_predictions
from stages.params.gate import Gate
from stages.registry import artifacts, gate_review, lineage, model_process, records, versions
from stages.registry.card.model_card import with_verdict
from stages.registry.card.review_page import write_verdict
from stages.registry.client import reachable
from stages.registry.examination import Examination
from stages.registry.model_process import ServedPredictions
from stages.registry.tags import GATE, GATE_AGAINST, LATENCY, MODEL_SHA256, NO_VERSION
from stages.registry.versions import Version
from stages.runtime import layout
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)

MAX_DIFFERENCE = 1e-3
"""Of any probability: more than the arithmetic of another CPU changes, less than other weights or pixels do."""
NO_CANARY = (
    "no images and answers are recorded with it, so nothing shows that it still answers as it did, which no tag "
    "`override` replaces. Register the same weights anew, which records them: delete this version, check out its "
    "commit with its data (`dvc pull`), and there `dvc repro -f -s register`"
)


def examine_version(name: str, number: str, opponent: str, gate: Gate, checkouts: Sequence[Path]) -> Examination:
    """Finds the versions, examines, and prints the result.

    Args:
        opponent: number of the version in force, or `none`; empty: the verdict stands as it is.
        checkouts: folders whose shards may be those that the version was evaluated on.

    Raises:
        StageError: a version is not there, MLflow failed, or the two cannot be held against each other.
    """
    version = versions.by_address(f"models:/{name}/{number}")
    held_against, against = opponent, None
    if opponent not in ("", NO_VERSION):
        against = versions.by_address(f"models:/{name}/{opponent}")
        held_against = against.sha256
        if not against.sha256:
            raise StageError(f"version {against.number} has no tag {MODEL_SHA256}, so nothing can be held against it")
        if against.number == version.number:
            raise StageError(f"version {version.number} cannot be held against itself; leave out --against")
    with reachable():
        result = examine(version, held_against, against, gate, checkouts)
    print(f"{version.name} version {version.number} is {'sound' if result.sound else 'NOT sound'}")
    held = f"against version {against.number}" if against else "by its floors alone"
    print(f"gate: {result.gate}" + (f", taken again {held}" if result.retaken else ""))
    for reason in result.reasons:
        print(f"- {reason}")
    return result


def examine(
    version: Version, held_against: str, against: Version | None, gate: Gate, checkouts: Sequence[Path] = ()
) -> Examination:
    """Whether the version is what was registered, and whether its verdict holds.

    Args:
        held_against: sha256 of the weights in force, NO_VERSION where there are none; empty: the verdict stands.
        against: the version in force, if any.
        checkouts: folders whose shards may be those that the version was evaluated on.

    Raises:
        StageError: the version, or MLflow, cannot be reached at all.
    """
    wrong, served = soundness(version)
    tagged = version.tags.get(GATE, "inconclusive")
    if held_against in ("", version.tags.get(GATE_AGAINST)):
        return Examination(not wrong, tagged, False, (*wrong, *_not_passed(records.verdict(version))))
    if wrong or not served:
        return Examination(False, tagged, False, tuple(wrong))
    try:
        verdict = take_again(version, served, against, gate, checkouts)
    except (StageError, KeyError, ValueError) as error:
        why = f"its gate was taken against other weights than those in force, and cannot be taken again: {error}"
        return Examination(True, "inconclusive", False, (why,))
    return Examination(True, verdict.result, True, tuple(_not_passed(verdict)))


def soundness(version: Version) -> tuple[list[str], ServedPredictions | None]:
    """What is wrong with the version, nothing where it is sound; and what it predicts for the recorded images."""
    canary = records.canary(version)
    if canary is None:
        return [NO_CANARY], None
    try:
        served = _predict(version, list(canary["image"]))
    except StageError as error:
        first, *rest = str(error).splitlines()
        return [" ".join([first, *(line.strip() for line in rest[-1:])])], None
    wrong = []
    if served.weights != version.sha256:
        tagged = version.sha256 or "-"
        wrong.append(f"its weights are not those registered: sha256 {served.weights}, by its tag {tagged}")
    recorded = np.stack(canary["probabilities"].to_list())
    if served.probabilities.shape != recorded.shape:
        wrong.append(f"it answers with {served.probabilities.shape[1]} classes, once it was {recorded.shape[1]}")
    elif not (difference := float(np.abs(served.probabilities - recorded).max())) <= MAX_DIFFERENCE:
        wrong.append(
            f"it does not answer as it did when it was registered: on {len(recorded)} recorded images its "
            f"probabilities are up to {difference:.3g} away (at most {MAX_DIFFERENCE:g})"
        )
    return wrong, served


def _predict(version: Version, images: list[bytes]) -> ServedPredictions:
    """Tries twice before it says that a model does not predict: a server may restart in between."""
    try:
        with model_process.fresh_process() as process:
            return model_process.predict(process, version.source, images)
    except StageError as error:
        logger.warning("warning: %s\nit is asked once more", error)
    versions.list_versions(version.name)  # raises where it is the registry that fails, which is not the model's fault
    with model_process.fresh_process() as process:
        return model_process.predict(process, version.source, images)


def take_again(
    version: Version, served: ServedPredictions, against: Version | None, gate: Gate, checkouts: Sequence[Path]
) -> Verdict:
    """Takes the gate from what was recorded with both versions, and replaces verdict, card and tags.

    The version in force predicts now for images of later deliveries, as far as `checkouts` hold them.

    Raises:
        StageError: something is not recorded.
        KeyError, ValueError: what is recorded does not go together.
    """
    run, table, metrics = lineage.get_run(version.run_id), records.predictions(version), records.metrics(version)
    if run is None or table is None or metrics is None:
        raise StageError(f"its run {version.run_id} is gone, or holds no {layout.PREDICTIONS} or {layout.METRICS}")
    other = None
    if against:
        at_hand = [each.folder for checkout in checkouts for each in lineage.training_data_of(run, checkout)]
        shards = list({folder.name: folder for folder in at_hand}.values())
        other = against, gate_review.predictions_of(against, table, served.classes, shards)
    latency = version.tags.get(LATENCY)
    weights = served.size, float(latency) if latency else None
    candidate = version_predictions(version.sha256, table)
    review = gate_review.review(
        version.name, candidate, metrics["test"], weights, other, served.classes, gate, version.run_id
    )
    if GATE_AGAINST in version.tags:
        # First, and set again last: a kill in between must not leave the new result beside the old opponent.
        versions.delete_tag(version, GATE_AGAINST)
    with tempfile.TemporaryDirectory() as folder:
        write_verdict(review, Path(folder, records.own_folder(version.name)), records.exports(version))
        artifacts.log_files(run, Path(folder))
    versions.describe_version(version, with_verdict(version.description, review))
    versions.set_tags(version, gate_review.verdict_tags(review.verdict))
    gate_review.count_decision(version.name, review.verdict)
    return review.verdict


def _not_passed(verdict: Verdict | None) -> list[str]:
    conditions = verdict.conditions if verdict else ()
    return [f"{each.name}: {each.result}, {each.detail}" for each in conditions if each.result != "passed"]
