"""Taking the gate: a candidate against the version in force, and the review that people read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation.gate import MEGABYTE, Verdict, judge, test_set
from stages.evaluation.predictions import VersionPredictions, no_predictions, version_predictions
from stages.pages.text import percent, shortened
from stages.params.gate import Gate
from stages.registry import lineage, model_process, records, versions
from stages.registry.links import comparison_link
from stages.registry.tags import DECISION, DECISIONS, GATE, GATE_AGAINST, NO_VERSION, TEST_SET
from stages.registry.versions import Version
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)


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

    verdict: Verdict
    against: str
    """As a person calls it, `version 3`; empty where nothing was in force."""
    candidate: VersionPredictions
    in_force: VersionPredictions | None
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


def predictions_of(
    version: Version, candidate: pd.DataFrame, classes: Sequence[str], shards: Sequence[Path]
) -> VersionPredictions:
    """What a version predicts for the candidate's images: as recorded; it predicts now where it has not seen one yet.

    Args:
        candidate: the candidate's reports/predictions.parquet.
        classes: names of the candidate's classes by label.
        shards: sets of role finetune, in which images without a recorded prediction are looked for.

    Raises:
        KeyError, ValueError: the two do not go together.
    """
    images = candidate.drop(columns="logits")
    known = images.merge(_with_same_labels(records.predictions(version), candidate), on="key")
    if missing := sorted(set(images["key"]) - set(known["key"])):
        logger.info("asking version %d about %d images that it has not answered yet", version.number, len(missing))
        try:
            known = pd.concat([known, images.merge(_predicted_now(version, missing, classes, shards), on="key")])
        except StageError as error:
            # Without test images the gate then says `inconclusive`: what cannot be compared is no reason to pass.
            logger.warning("warning: version %d cannot be asked: %s", version.number, error)
    has_test = bool((known["split"] == "test").any())
    return version_predictions(version.sha256, known) if has_test else no_predictions(version.sha256)


def _predicted_now(
    version: Version, keys: Sequence[str], classes: Sequence[str], shards: Sequence[Path]
) -> pd.DataFrame:
    if not shards:
        raise StageError("the shards with these images are not here")
    predicted, its_classes = model_process.predict_shards(version.source, keys, shards)
    first = list(classes[: len(its_classes)])
    if its_classes != first:
        if set(its_classes) != set(first):
            raise StageError(
                "its classes are not the first ones of data/classes/finetune.json, so it answers in others"
            )
        order = [its_classes.index(name) for name in first]
        predicted = predicted.assign(logits=predicted["logits"].map(lambda logits: np.asarray(logits)[order]))
    return predicted


def _with_same_labels(recorded: pd.DataFrame | None, candidate: pd.DataFrame) -> pd.DataFrame:
    """Recorded key and logits; none where a label has changed, because a class id then meant another class."""
    if recorded is None or recorded["key"].duplicated().any():
        return pd.DataFrame({"key": pd.Series(dtype=str), "logits": pd.Series(dtype=object)})
    both = recorded.merge(candidate[["key", "label"]], on="key", suffixes=("", "_now"))
    same = bool((both["label"] == both["label_now"]).all())
    return (recorded if same else recorded.iloc[:0])[["key", "logits"]]


def review(
    name: str,
    candidate: VersionPredictions,
    figures: Mapping[str, float | None],
    weights: tuple[int, float | None],
    against: tuple[Version, VersionPredictions] | None,
    classes: Sequence[str],
    gate: Gate,
    run_id: str,
) -> Review:
    """Takes the gate.

    Args:
        name: of the registered model; its earlier decisions on the same test set are counted.
        figures: `test` of the candidate's reports/metrics.json.
        weights: their size in bytes, and the median latency of one image in ms.
        against: the version in force and its predictions; None where there is none, and the floors decide.
        classes: names of the candidate's classes by label.
        run_id: of the candidate's run.

    Raises:
        KeyError, ValueError: figures and predictions are not of one evaluation.
    """
    version, in_force = against or (None, None)
    size, latency_ms = weights
    number = _decisions(name, test_set(candidate)) + 1
    recorded = records.figures(version) if version else {}
    verdict = judge(candidate, figures, size, latency_ms, in_force, gate, number, classes)
    return Review(
        verdict=verdict,
        against=f"version {version.number}" if version else "",
        candidate=candidate,
        in_force=in_force,
        classes=classes,
        comparison=_comparison(run_id, version.run_id) if version else "",
        figures=dict(figures) | {"latency_ms": latency_ms, "size_mb": size / MEGABYTE},
        figures_in_force=recorded,
        same_test_set=version is None or "top1" not in recorded or version.tags.get(TEST_SET) == verdict.test_set,
    )


def _decisions(name: str, test_set: str) -> int:
    """How many decisions were taken on a test set, those of deleted versions included."""
    taken = [version.tags for version in versions.list_versions(name) if version.tags.get(TEST_SET) == test_set]
    counted = int(versions.model_tags(name).get(DECISIONS.format(test_set=test_set), 0))
    # Of the versions too: one whose registration died before it was counted has its number.
    return max([counted, *(int(tags.get(DECISION, 1)) for tags in taken)])


def count_decision(name: str, verdict: Verdict) -> None:
    """Keeps the number of a verdict with the registered model, where it outlives its version."""
    versions.set_model_tag(name, DECISIONS.format(test_set=verdict.test_set), str(verdict.decisions))


def _comparison(*run_ids: str) -> str:
    runs = [run for run_id in run_ids if (run := lineage.get_run(run_id))]
    return comparison_link(runs) if len(runs) == len(run_ids) else ""


def verdict_tags(verdict: Verdict) -> dict[str, str]:
    """A version's tags, in the order of writing: a verdict that was written in part has no GATE_AGAINST."""
    return {
        GATE: verdict.result,
        TEST_SET: verdict.test_set,
        DECISION: str(verdict.decisions),
        GATE_AGAINST: NO_VERSION if verdict.in_force is None else verdict.in_force,
    }
