"""The gate applied: the version that it is taken against, and what the registry keeps of a verdict."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.pages.text import percent, shortened
from stages.params.gate import Gate
from stages.registry import artifacts, model_process, versions
from stages.registry.client import open_client
from stages.registry.links import comparison_link
from stages.registry.versions import Version
from stages.runtime.command import StageError

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Run

    from stages.evaluation.gate import Verdict
    from stages.evaluation.predictions import VersionPredictions

logger = logging.getLogger(__name__)

PREDICTIONS = Path("reports/predictions.parquet")
METRICS = Path("reports/metrics.json")
DECISION = "gate.decision"
"""The tag that says the how-manyth decision on its test set a verdict was."""
DECISIONS = "gate.decisions.{test_set}"
"""The tag of the registered model that says how many a test set has taken: versions may be deleted."""
EXPORTS = "exports.json"
LATENCY = "latency.median_ms"
IN_FORCE = "gate.in_force"
"""The tag that says whom a verdict was taken against, by sha256 of the weights. Without it no verdict holds."""
NOBODY = "none"
"""In the tag IN_FORCE: no version was in force, and the floors decided alone."""


@dataclass(frozen=True)
class BatchCounts:
    """What training and evaluation had of a batch: images per split."""

    name: str
    role: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Candidate:
    """All that is known of the model that is to be registered, without what it was held against."""

    sha256: str
    config: Mapping[str, Any]
    """models/finetuned/config.json"""
    metrics: Mapping[str, Any]
    """reports/metrics.json"""
    quarantined: Mapping[str, int]
    """Images by reason."""
    batches: Sequence[BatchCounts]
    confidence: float
    """Of the intervals in `metrics`, 0-1."""
    git: Mapping[str, str]
    latency_ms: tuple[float, float]
    """Median and 95th percentile of one image on a CPU."""
    validation: Mapping[str, Any]
    """reports/validation.json; empty where there is none."""


@dataclass(frozen=True)
class Review:
    """The gate's verdict, and the two versions that it is about."""

    verdict: "Verdict"
    against: str
    """As a person calls it, `version 3`; empty where nothing was in force."""
    candidate: "VersionPredictions"
    in_force: "VersionPredictions | None"
    classes: Sequence[str]
    """Names by label."""
    comparison: str = ""
    """Address of MLflow's page that compares both runs."""
    figures: Mapping[str, float | None] = field(default_factory=dict)
    """Of the candidate: `test` of its metrics.json, `latency_ms`, `size_mb`."""
    figures_in_force: Mapping[str, float | None] = field(default_factory=dict)
    """The same of the version in force, as far as they were recorded with it."""
    same_test_set: bool = True
    """Whether both figures are of the same test set."""

    @property
    def line(self) -> str:
        """The verdict in one sentence."""
        against = f"against {self.against}" if self.against else "floors only: no version was in force"
        return f"Gate: {self.verdict.result} ({against})"

    @property
    def note(self) -> str:
        """What the verdict means."""
        if not self.against:
            return "The first model has only floors to clear. The next is held against the version then in force."
        if not self.verdict.comparisons:
            return f"{self.against.capitalize()} could not be compared with; the conditions say why."
        return (
            f"Compared with {self.against}, `{(self.verdict.in_force or '')[:12]}`, on the same images"
            f"{self._unknown}. An equally good model passes in at most {percent(self.verdict.alpha, 0)} of cases, an "
            f"identical one never."
        )

    @property
    def _unknown(self) -> str:
        """Images of classes that the version in force was not trained on; empty where there are none."""
        theirs = self.in_force
        labels = theirs.labels[theirs.labels >= theirs.classes] if theirs and theirs.classes else np.empty(0, np.int64)
        if not len(labels):
            return ""
        first, *more = [shortened(class_name(self.classes, label)) for label in np.unique(labels).tolist()]
        named = f"{first} and {len(more):,} more" if more else first
        return f"; {len(labels):,} are of classes that it does not know ({named}) and count as its errors"

    @property
    def decisions(self) -> str:
        """How often this test set has decided, and what that means."""
        count, test_set = self.verdict.decisions, self.verdict.test_set[:12]
        if count < 2:
            return f"The first decision on this test set, `{test_set}`."
        if not self.against:
            return f"Decision number {count:,} on this test set, `{test_set}`."
        return (
            f"Decision number {count:,} on this test set, `{test_set}`. The more it decides, the likelier one is luck: "
            f"of {count:,} equally good models at least one passes with a chance of up to "
            f"{percent(1 - (1 - self.verdict.alpha) ** count, 0)}."
        )


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a label, `class 7` where it has none."""
    return classes[label] if label < len(classes) else f"class {label}"


def own_folder(name: str) -> str:
    """Where a run keeps what is of one registration: its model may be registered under several names."""
    return f"registered/{name}"


def recorded_predictions(version: Version) -> "pd.DataFrame | None":
    """The version's reports/predictions.parquet; None where it is gone or cannot be read, which is logged."""
    import pandas as pd

    why = "its run holds none, or is gone"
    with tempfile.TemporaryDirectory() as folder:
        path = artifacts.download(version.run_id, PREDICTIONS.as_posix(), Path(folder))
        try:
            if path:
                return pd.read_parquet(path, columns=["key", "batch", "split", "label", "logits"])
        except (KeyError, ValueError, OSError) as error:
            why = f"those of its run cannot be read: {error}"
    logger.warning("warning: no predictions of version %d are recorded (%s)", version.number, why)
    return None


def recorded_json(version: Version, path: str) -> dict[str, Any] | None:
    """A JSON file of the version's run; None where it is gone.

    Raises:
        ValueError: it is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = artifacts.download(version.run_id, path, Path(folder))
        return json.loads(file.read_text(encoding="utf-8")) if file else None


def recorded_figures(version: Version) -> dict[str, float | None]:
    """`test` of the version's reports/metrics.json, its `latency_ms` and its `size_mb`, as far as they are recorded."""
    from stages.evaluation.gate import SIZE

    figures: dict[str, float | None] = {}
    try:
        figures |= (recorded_json(version, METRICS.as_posix()) or {"test": {}})["test"]
        gate = recorded_json(version, f"{own_folder(version.name)}/gate.json") or {"conditions": []}
        figures["size_mb"] = next((each["figure"] for each in gate["conditions"] if each["name"] == SIZE), None)
        figures["latency_ms"] = float(version.tags[LATENCY]) if LATENCY in version.tags else None
    except (KeyError, TypeError, ValueError) as error:  # the card shows `–` for them
        logger.warning("warning: not all figures recorded with version %d can be read: %s", version.number, error)
    return figures


def answers(
    version: Version, asked: "pd.DataFrame", classes: Sequence[str], shards: Sequence[Path]
) -> "VersionPredictions":
    """What a version says to the images that a candidate was asked; to those it has not seen yet, it is asked now.

    Args:
        asked: the candidate's reports/predictions.parquet.
        classes: names of the candidate's classes by label.
        shards: sets of role finetune, in which those images are looked for.

    Raises:
        KeyError, ValueError: the two do not go together.
    """
    import pandas as pd

    from stages.evaluation.predictions import no_predictions, version_predictions

    recorded = recorded_predictions(version)
    images = asked.drop(columns="logits")
    known = images.merge(_of_same_labels(recorded, asked), on="key")
    if missing := sorted(set(images["key"]) - set(known["key"])):
        logger.info("asking version %d about %d images that it has not answered yet", version.number, len(missing))
        try:
            known = pd.concat([known, images.merge(_scored(version, missing, classes, shards), on="key")])
        except StageError as error:
            # Without test images the gate then says `inconclusive`: what cannot be compared is no reason to pass.
            logger.warning("warning: version %d cannot be asked: %s", version.number, error)
    return (
        version_predictions(version.sha256, known)
        if (known["split"] == "test").any()
        else no_predictions(version.sha256)
    )


def _scored(version: Version, keys: Sequence[str], classes: Sequence[str], shards: Sequence[Path]) -> "pd.DataFrame":
    if not shards:
        raise StageError("the shards with these images are not here")
    scored, its_classes = model_process.score(version.source, keys, shards)
    if its_classes != list(classes[: len(its_classes)]):
        raise StageError("its classes are not the first ones of data/classes/finetune.json, so it answers in others")
    return scored


def _of_same_labels(recorded: "pd.DataFrame | None", asked: "pd.DataFrame") -> "pd.DataFrame":
    """Recorded answers, key and logits; none where a label has changed, so that a class id meant another class."""
    import pandas as pd

    if recorded is None or recorded["key"].duplicated().any():
        return pd.DataFrame({"key": pd.Series(dtype=str), "logits": pd.Series(dtype=object)})
    both = recorded.merge(asked[["key", "label"]], on="key", suffixes=("", "_now"))
    same = bool((both["label"] == both["label_now"]).all())
    return (recorded if same else recorded.iloc[:0])[["key", "logits"]]


def review(
    name: str,
    candidate: "VersionPredictions",
    figures: Mapping[str, float | None],
    weights: tuple[int, float | None],
    against: "tuple[Version, VersionPredictions] | None",
    classes: Sequence[str],
    gate: Gate,
    run_id: str,
) -> Review:
    """Takes the gate.

    Args:
        name: of the registered model, whose earlier decisions on the same test set are counted.
        figures: `test` of the candidate's reports/metrics.json.
        weights: bytes and, in ms, median latency.
        against: the version in force and what it said; None where there is none, and the floors decide.
        classes: names of the candidate's classes by label.
        run_id: of the candidate's run.

    Raises:
        KeyError, ValueError: figures and answers are not of one evaluation.
    """
    from stages.evaluation.gate import MEGABYTE, judge, test_set

    version, answers = against or (None, None)
    size, latency_ms = weights
    number = _decisions(name, test_set(candidate)) + 1
    recorded = recorded_figures(version) if version else {}
    verdict = judge(candidate, figures, size, latency_ms, answers, gate, number, classes)
    shown = f"version {version.number}" if version else ""
    comparison = _comparison(run_id, version.run_id) if version else ""
    return Review(
        verdict, shown, candidate, answers, classes, comparison,
        figures=dict(figures) | {"latency_ms": latency_ms, "size_mb": size / MEGABYTE},
        figures_in_force=recorded,
        same_test_set=version is None or "top1" not in recorded or version.tags.get("test.set") == verdict.test_set,
    )  # fmt: skip


def _decisions(name: str, test_set: str) -> int:
    """How many decisions were taken on a test set, those of deleted versions included."""
    tags = [version.tags for version in versions.list_versions(name) if version.tags.get("test.set") == test_set]
    counted = int(versions.model_tags(name).get(DECISIONS.format(test_set=test_set), 0))
    # Of the versions too: one that died before it was counted has its number.
    return max([counted, *(int(each.get(DECISION, 1)) for each in tags)])


def count_decision(name: str, verdict: "Verdict") -> None:
    """Keeps the number of a verdict with the registered model, where it outlives its version."""
    versions.set_model_tag(name, DECISIONS.format(test_set=verdict.test_set), str(verdict.decisions))


def _comparison(*run_ids: str) -> str:
    runs = [run for run_id in run_ids if (run := find_run(run_id))]
    return comparison_link(runs) if len(runs) == len(run_ids) else ""


def find_run(run_id: str) -> "Run | None":
    """The run with this id, unless it is gone."""
    from mlflow.exceptions import MlflowException

    try:
        return open_client().get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def recorded_exports(version: Version) -> dict[str, Any]:
    """By format, what stages.export has recorded with the version; a damaged record is as none, which is logged."""
    try:
        return recorded_json(version, f"{own_folder(version.name)}/{EXPORTS}") or {}
    except ValueError as error:
        logger.warning("warning: the exports recorded with version %d cannot be read: %s", version.number, error)
        return {}


def verdict_tags(verdict: "Verdict") -> dict[str, str]:
    """What a version is tagged with; against whom comes last: without it, half of them are taken for no verdict."""
    return {
        "gate": verdict.result,
        "test.set": verdict.test_set,
        DECISION: str(verdict.decisions),
        IN_FORCE: NOBODY if verdict.in_force is None else verdict.in_force,
    }
