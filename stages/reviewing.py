"""The gate applied: the version that it is taken against, and what the registry keeps of a verdict."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages import tracking
from stages.files import write_json, write_text
from stages.params.gate import Gate

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Run

    from stages.evaluation.gate import Answers, Verdict
    from stages.model_card import Review

logger = logging.getLogger(__name__)

PREDICTIONS = Path("reports/predictions.parquet")
METRICS = Path("reports/metrics.json")
DECISION = "gate.decision"
"""The tag that says the how-manyth decision on its test set a verdict was."""
NOBODY = "none"
"""In the tag `gate.in_force`: no version was in force, and the floors decided alone."""


def own_folder(name: str) -> str:
    """Where a run keeps what is of one registration: its model may be registered under several names."""
    return f"registered/{name}"


def recorded_predictions(version: tracking.Version) -> "pd.DataFrame | None":
    """The version's reports/predictions.parquet; None where it is gone or cannot be read, which is logged."""
    import pandas as pd

    why = "its run holds none, or is gone"
    with tempfile.TemporaryDirectory() as folder:
        path = tracking.download(version.run_id, PREDICTIONS.as_posix(), Path(folder))
        try:
            if path:
                return pd.read_parquet(path, columns=["key", "batch", "split", "label", "logits"])
        except (KeyError, ValueError, OSError) as error:
            why = f"those of its run cannot be read: {error}"
    logger.warning("warning: no predictions of version %d are recorded (%s)", version.number, why)
    return None


def review(
    name: str,
    candidate: "Answers",
    figures: Mapping[str, float | None],
    weights: tuple[int, float | None],
    against: "tuple[tracking.Version, Answers] | None",
    classes: Sequence[str],
    gate: Gate,
    run_id: str,
) -> "Review":
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
    from stages.evaluation.gate import judge, test_set
    from stages.model_card import Review

    version, answers = against or (None, None)
    size, latency_ms = weights
    number = _decisions(name, test_set(candidate)) + 1
    verdict = judge(candidate, figures, size, latency_ms, answers, gate, number, classes)
    shown = f"version {version.number}" if version else ""
    comparison = _comparison(run_id, version.run_id) if version else ""
    return Review(verdict, shown, candidate, answers, classes, comparison)


def _decisions(name: str, test_set: str) -> int:
    """How many decisions were taken on a test set. Each carries its number, so that those of deleted ones count too."""
    tags = [version.tags for version in tracking.versions(name) if version.tags.get("test.set") == test_set]
    return max((int(each.get(DECISION, 1)) for each in tags), default=0)


def _comparison(*run_ids: str) -> str:
    runs = [run for run_id in run_ids if (run := find_run(run_id))]
    return tracking.comparison_link(runs) if len(runs) == len(run_ids) else ""


def find_run(run_id: str) -> "Run | None":
    """The run with this id, unless it is gone."""
    from mlflow.exceptions import MlflowException

    try:
        return tracking.open_client().get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def write_verdict(review: "Review", folder: Path) -> None:
    """gate.json and review.html."""
    from stages.model_card import render_review

    write_json(folder / "gate.json", review.verdict.to_dict())
    write_text(folder / "review.html", render_review(review))


def verdict_tags(verdict: "Verdict") -> dict[str, str]:
    """What a version is tagged with; against whom comes last, so that of half of them none is taken for current."""
    return {
        "gate": verdict.result,
        "test.set": verdict.test_set,
        DECISION: str(verdict.decisions),
        "gate.in_force": verdict.in_force or NOBODY,
    }
