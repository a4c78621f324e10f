"""Examines a version of a registered model before it goes into force.

It is sound where its weights are those that were registered, and where it answers the images that were recorded with
it as it did then, in a process of its own. With --against, its verdict is looked at too: one that was taken against
other weights than those of that version is taken again, from what both have answered. The version in force is asked now
about images that it has not seen, those of later deliveries, as far as their shards are at hand.

Ends with 0 whatever it found, and with 1 and a message where it could not look.
"""

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.params.gate import Gate
from stages.registry import artifacts, gate_review, lineage, model_process, versions
from stages.registry.client import reachable
from stages.registry.gate_review import IN_FORCE, LATENCY, METRICS, NOBODY, PREDICTIONS, own_folder
from stages.registry.tags import MODEL_SHA256
from stages.registry.versions import Version
from stages.runtime.command import StageError, run
from stages.runtime.files import write_json
from stages.runtime.params_file import load_section

if TYPE_CHECKING:
    import pandas as pd

    from stages.evaluation.gate import Verdict
    from stages.registry.model_process import Said

logger = logging.getLogger(__name__)

MOST_DIFFERENT = 1e-3
"""Of any probability: more than the arithmetic of another CPU changes, less than other weights or pixels do."""
NO_CANARY = (
    "no images and answers are recorded with it, so nothing shows that it still answers as it did, which no tag "
    "`override` replaces. Register the same weights anew, which records them: delete this version, check out its "
    "commit with its data (`dvc pull`), and there `dvc repro -f -s register`"
)


@dataclass(frozen=True)
class Examination:
    """What was found; the file of --json."""

    sound: bool
    gate: str
    """passed, failed or inconclusive"""
    retaken: bool
    reasons: list[str]
    """Why it is not sound, and each condition of the gate that did not pass."""


def examine(
    version: Version,
    held_against: str,
    against: Version | None,
    gate: Gate,
    checkouts: Sequence[Path] = (),
) -> Examination:
    """Whether the version is what was registered, and whether its verdict holds.

    Args:
        held_against: sha256 of the weights in force, NOBODY where there are none; empty: the verdict stands as it is.
        against: the version in force, if any.
        checkouts: where the shards may lie that the version was evaluated on.

    Raises:
        StageError: the version, or MLflow, cannot be asked at all.
    """
    wrong, said = soundness(version)
    tagged = version.tags.get("gate", "inconclusive")
    if held_against in ("", version.tags.get(IN_FORCE)):
        return Examination(not wrong, tagged, False, wrong + _not_passed(_recorded_verdict(version)))
    if wrong or not said:
        return Examination(False, tagged, False, wrong)
    try:
        verdict = take_again(version, said, against, gate, checkouts)
    except (StageError, KeyError, ValueError) as error:
        why = f"its gate was taken against other weights than those in force, and cannot be taken again: {error}"
        return Examination(True, "inconclusive", False, [why])
    return Examination(True, verdict.result, True, _not_passed(verdict))


def soundness(version: Version) -> "tuple[list[str], Said | None]":
    """What is wrong with the version, nothing where it is sound; and what it said to the recorded images."""
    import numpy as np

    canary = _canary(version)
    if canary is None:
        return [NO_CANARY], None
    try:
        said = _ask(version, list(canary["image"]))
    except StageError as error:
        first, *rest = str(error).splitlines()
        return [" ".join([first, *(line.strip() for line in rest[-1:])])], None
    wrong = []
    if said.weights != version.sha256:
        wrong.append(f"its weights are not those registered: sha256 {said.weights}, by its tag {version.sha256 or '-'}")
    recorded = np.stack(canary["probabilities"].to_list())
    if said.probabilities.shape != recorded.shape:
        wrong.append(f"it answers with {said.probabilities.shape[1]} classes, once it was {recorded.shape[1]}")
    elif not (difference := float(np.abs(said.probabilities - recorded).max())) <= MOST_DIFFERENT:
        wrong.append(
            f"it does not answer as it did when it was registered: on {len(recorded)} recorded images its "
            f"probabilities are up to {difference:.3g} away (at most {MOST_DIFFERENT:g})"
        )
    return wrong, said


def _canary(version: Version) -> "pd.DataFrame | None":
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder:
        path = artifacts.download(version.run_id, f"{own_folder(version.name)}/canary.parquet", Path(folder))
        try:
            return pd.read_parquet(path, columns=["image", "probabilities"]) if path else None
        except (ValueError, OSError) as error:
            logger.warning("warning: the recorded images of version %d cannot be read: %s", version.number, error)
            return None


def _ask(version: Version, images: list[bytes]) -> "Said":
    """Asks twice before it says that a model does not answer: a server may be started anew in between."""
    try:
        with model_process.fresh_process() as process:
            return model_process.ask(process, version.source, images)
    except StageError as error:
        logger.warning("warning: %s\nit is asked once more", error)
    versions.list_versions(version.name)  # raises where it is the registry that fails, which is not the model's fault
    with model_process.fresh_process() as process:
        return model_process.ask(process, version.source, images)


def take_again(
    version: Version,
    said: "Said",
    against: Version | None,
    gate: Gate,
    checkouts: Sequence[Path],
) -> "Verdict":
    """Takes the gate from what was recorded with both versions, and replaces verdict, card and tags.

    Images that the version in force has not answered, those of later deliveries, are looked for in `checkouts`.

    Raises:
        StageError: something is not recorded.
        KeyError, ValueError: what is recorded does not go together.
    """
    from stages.evaluation.predictions import version_predictions
    from stages.registry.card.model_card import with_verdict
    from stages.registry.card.review_page import write_verdict

    run, predicted = gate_review.find_run(version.run_id), gate_review.recorded_predictions(version)
    metrics = gate_review.recorded_json(version, METRICS.as_posix())
    if run is None or predicted is None or metrics is None:
        raise StageError(f"its run {version.run_id} is gone, or holds no {PREDICTIONS} or {METRICS}")
    other = None
    if against:
        at_hand = [each.folder for checkout in checkouts for each in lineage.training_data_of(run, checkout)]
        shards = list({folder.name: folder for folder in at_hand}.values())
        other = against, gate_review.answers(against, predicted, said.classes, shards)
    latency = version.tags.get(LATENCY)
    weights = said.size, float(latency) if latency else None
    answers = version_predictions(version.sha256, predicted)
    review = gate_review.review(
        version.name, answers, metrics["test"], weights, other, said.classes, gate, version.run_id
    )
    if IN_FORCE in version.tags:
        # First, and set again last: a kill in between must not leave the new result beside the old opponent.
        versions.delete_tag(version, IN_FORCE)
    with tempfile.TemporaryDirectory() as folder:
        exports = gate_review.recorded_exports(version)
        write_verdict(review, Path(folder, own_folder(version.name)), exports)
        artifacts.log_files(run, Path(folder))
    versions.describe_version(version, with_verdict(version.description, review))
    versions.set_tags(version, gate_review.verdict_tags(review.verdict))
    gate_review.count_decision(version.name, review.verdict)
    return review.verdict


def _recorded_verdict(version: Version) -> "Verdict | None":
    from stages.evaluation.gate import Verdict

    try:
        values = gate_review.recorded_json(version, f"{own_folder(version.name)}/gate.json")
        return Verdict.from_dict(values) if values else None
    except (KeyError, TypeError, ValueError):  # of an older form, or damaged: its reasons are in the card
        return None


def _not_passed(verdict: "Verdict | None") -> list[str]:
    conditions = verdict.conditions if verdict else ()
    return [f"{each.name}: {each.result}, {each.detail}" for each in conditions if each.result != "passed"]


def main() -> None:
    """Finds the versions, examines, and says what was found."""
    arguments = _arguments()
    version = model_process.find(f"models:/{arguments.name}/{arguments.version}")
    held_against, against = "", None
    if arguments.against == NOBODY:
        held_against = NOBODY
    elif arguments.against:
        against = model_process.find(f"models:/{arguments.name}/{arguments.against}")
        held_against = against.sha256
    if against and not against.sha256:
        raise StageError(f"version {against.number} has no tag {MODEL_SHA256}, so nothing can be held against it")
    if against and against.number == version.number:
        raise StageError(f"version {version.number} cannot be held against itself; leave out --against")
    with reachable():
        found = examine(version, held_against, against, load_section("gate", Gate), [Path(), *arguments.data])
    print(f"{version.name} version {version.number} is {'sound' if found.sound else 'NOT sound'}")
    held = f"against version {against.number}" if against else "by its floors alone"
    print(f"gate: {found.gate}" + (f", taken again {held}" if found.retaken else ""))
    for reason in found.reasons:
        print(f"- {reason}")
    if arguments.json:
        write_json(arguments.json, asdict(found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the registered model")
    parser.add_argument("version", help="its number")
    parser.add_argument("--against", metavar="VERSION|none", help="the version in force, or none")
    parser.add_argument(
        "--data", type=Path, action="append", default=[], metavar="CHECKOUT",
        help="another one whose shards may be those of the version; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was found")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
