"""What an evaluator is given and what it returns; evaluators/README.md says how to add one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from stages.data.shards.loading.samples.index import Samples
from stages.evaluation.evaluators.gallery_choice import Chosen
from stages.evaluation.predictions import Predictions
from stages.evaluation.training_pass import TrainingPredictions
from stages.params.evaluate import Evaluate
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier

DIGITS = 6
"""Digits of every figure written; further ones are noise to a reader and differ between builds of numpy."""


@dataclass(frozen=True)
class EvaluationInputs:
    """What all evaluators share. Each model has predicted every image once."""

    settings: Evaluate
    config: Mapping[str, Any]
    """config.json of the fine-tuned model."""
    model: Classifier
    """The fine-tuned one, on the device, in evaluation mode."""
    compute: Compute
    train: Samples
    """The labelled training images."""
    test: Predictions
    fresh: Predictions
    training: TrainingPredictions
    """On `train`; its `nearest` are of `chosen.mistakes`."""
    chosen: Chosen
    """The test images that the galleries show."""

    @property
    def classes(self) -> Sequence[str]:
        """Names by label."""
        return self.config["classes"]


class ReportSection(NamedTuple):
    """A part of reports/report.html."""

    template: Path
    """Rendered with `values`, and `figures`, `test` (its figures of test), `classes`, `settings`, `level`."""
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What an evaluator found; only the section is not optional."""

    section: ReportSection
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Top-level entries of reports/metrics.json, NaN where a figure is not defined."""
    plots: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Tables reports/plots/<name>.csv, for `dvc plots`."""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Other tables reports/<name>.csv."""


class Evaluator(Protocol):
    """A module of evaluators/ with these two names."""

    name: str

    def measure(self, inputs: EvaluationInputs) -> Result:
        """Everything that this evaluator says about the model."""


def rounded(value: Any) -> Any:
    """Figures as they are written: rounded to `DIGITS`, None where not defined."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, int | np.integer):
        return int(value)
    return None if value is None or np.isnan(value) else round(float(value), DIGITS)
