"""What both training stages do before and after the loop: config, checks, the record of the run."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from stages.data.shards.loading.samples.index import Samples
from stages.params.training.model import Model
from stages.params.training.recipe import Recipe
from stages.runtime import layout
from stages.training.loop.checkpoints.work import TrainingWork
from stages.training.loop.objectives import ValidationView, validation_batch_size
from stages.training.loop.processes import is_first, wait_for_first
from stages.training.loop.progressive_resizing import sizes
from stages.training.networks.models import Classifier, check_takes


class RunLog(Protocol):
    """The record of one run; it only observes."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of one step (an epoch)."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run."""

    def log_artifacts(self, folder: Path) -> None:
        """The files of `folder`."""


Recorder = Callable[[str, Mapping[str, Any], Mapping[str, str], bool], AbstractContextManager[RunLog]]
"""(stage, params, tags, resumed) -> the record of a run; the stage modules pass `stages.registry.runs.training_run`."""


@contextmanager
def recorded(record: Recorder, stage: str, params: Mapping[str, Any], work: TrainingWork) -> Iterator[RunLog]:
    """The record of a stage's training. Its checkpoints are removed afterwards, unless an error was raised."""
    with record(stage, params, work.tags, work.resumed) as run:
        yield run
    wait_for_first()
    if is_first():
        work.remove()


def network_config(
    model: Model, classes: list[str], resize: int, normalisation: Mapping[str, list[float]]
) -> dict[str, Any]:
    """The content of config.json beside a network's weights."""
    return {
        "architecture": model.architecture,
        "stem": model.stem,
        "classes": classes,
        "image_size": model.image_size,
        "resize": resize,
        "mean": normalisation["mean"],
        "std": normalisation["std"],
    }


def class_names(role: str) -> list[str]:
    """The classes of a role, in the order of their labels."""
    return json.loads(layout.classes(role).read_text(encoding="utf-8"))


def check_sizes(network: Classifier, recipe: Recipe, image_size: int) -> None:
    """Raises StageError where the network cannot take an image size that training or validation will use."""
    for size, key in sizes(recipe, image_size).items():
        check_takes(network, size, key)


def validation_view(val: Samples, config: Mapping[str, Any], recipe: Recipe) -> ValidationView:
    """How val is shown to a network with this config."""
    return ValidationView(val, config["image_size"], config["resize"], validation_batch_size(recipe))
