"""One trial: a process of `stages.finetune --trial`, watched epoch by epoch."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from optuna.study import Study
from optuna.trial import Trial, TrialState

from pipelines.processes.stage_process import Stop, run_streamed
from pipelines.tuning.space import recipe_of, with_values
from pipelines.tuning.study import folder_number
from stages.params.finetune import Finetune
from stages.params.tune import Tune
from stages.registry.runs import PARENT
from stages.runtime.files import write_text
from stages.runtime.params_file import ParamsError
from stages.runtime.yaml_text import dump_yaml

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """What all trials of this worker share."""

    study: Study
    folder: Path
    tune: Tune
    params: dict[str, Any]
    """The whole of params.yaml as it was when the search began."""
    command: Sequence[str]
    """Starts a trial; its folder is added."""
    run_id: str
    """The search's run in MLflow."""
    stop: Stop


class EpochWatch:
    """What a trial has reported of its epochs so far."""

    def __init__(self, trial: Trial, progress: Path, tune: Tune, recipe: Finetune) -> None:
        self.trial, self.progress, self.tune, self.recipe = trial, progress, tune, recipe
        self.epochs = 0
        self.value: float | None = None
        """The metric of the weights that the trial would keep: the last epoch's, or under `patience` the best one's."""
        self.pruned = False
        self.error = ""
        self._best_monitored: float | None = None

    def should_stop(self) -> bool:
        """Reports new epochs; returns whether the trial is not worth going on with."""
        self.report()
        self.pruned = self.pruned or self.trial.should_prune()
        return self.pruned or bool(self.error)

    def report(self) -> None:
        """Reports to the study the epochs that it does not know yet."""
        if not self.progress.is_file():
            return
        epochs = [json.loads(line) for line in self.progress.read_text(encoding="utf-8").splitlines()]
        metric = self.tune.metric
        for epoch in epochs[self.epochs :]:
            if metric not in epoch:
                self.error = f"`tune.metric` is {metric}, which it does not measure ({_why_not_measured(metric)})"
                return
            value, monitored = epoch[metric], epoch.get(self.recipe.monitor, 0.0)
            best = self._best_monitored
            if not self.recipe.patience or best is None or not self.recipe.better(best, monitored):
                self.value, self._best_monitored = value, monitored
            self.trial.report(value, int(epoch["epoch"]) - 1)
            self.epochs += 1

    def describe(self) -> str:
        """The result in words."""
        return f"{self.tune.metric} {self.value:.4f}" if self.value is not None else "no epoch was finished"


def run_trial(search: Search, trial: Trial, held: IO[str]) -> None:
    """Trains one trial, and tells the study how it ended; where the search is stopped, another worker goes on with it.

    Args:
        held: the trial's lock, which its process inherits.
    """
    place = search.folder / str(folder_number(trial))
    place.mkdir(exist_ok=True)
    values = with_values(search.params, trial.params)
    try:
        recipe = recipe_of(values)
    except ParamsError as error:  # two values that do not go together
        _fail(search.study, trial, str(error))
        return
    write_text(place / "params.yaml", dump_yaml(values))
    environment = os.environ | {"SYNSET_PARAMS": str(place / "params.yaml"), PARENT: search.run_id}
    lines: list[str] = []
    watch = EpochWatch(trial, place / "finetuned/progress.jsonl", search.tune, recipe)
    stop = Stop(also=lambda: search.stop.requested() or watch.should_stop(), every=1.0)
    logger.info("trial %d: %s", trial.number, in_words(trial.params, whole_keys=False))
    code = run_streamed([*search.command, str(place)], lines.append, stop, env=environment, pass_fds=[held.fileno()])
    write_text(place / "output.txt", "".join(f"{line}\n" for line in lines))
    if search.stop.requested():
        return
    watch.report()
    if not (watch.error or watch.pruned) and (code or watch.value is None):
        error_line = next((line for line in reversed(lines) if line.startswith("error")), f"ended with {code}")
        watch.error = f"{error_line} (all that it said: {place / 'output.txt'})"
    _tell(search.study, trial, watch)
    shutil.rmtree(place / "finetuned", ignore_errors=True)  # its checkpoint
    shutil.rmtree(place / "model", ignore_errors=True)  # `dvc repro` makes it again


def _tell(study: Study, trial: Trial, watch: EpochWatch) -> None:
    if watch.error:
        _fail(study, trial, watch.error)
    elif watch.pruned:
        study.tell(trial, state=TrialState.PRUNED)
        logger.info("trial %d: stopped after epoch %d, %s", trial.number, watch.epochs, watch.describe())
    else:
        study.tell(trial, watch.value)
        logger.info("trial %d: %s", trial.number, watch.describe())


def _fail(study: Study, trial: Trial, reason: str) -> None:
    trial.set_user_attr("error", reason)
    study.tell(trial, state=TrialState.FAIL)
    logger.warning("trial %d failed: %s", trial.number, reason)


def _why_not_measured(metric: str) -> str:
    return "no `finetune.adversarial`" if metric == "val_robust_top1" else "val has no images: `split.val_fraction`"


def in_words(values: dict[str, Any], whole_keys: bool = True) -> str:
    """`finetune.lr 0.1, ...`, or `lr 0.1, ...` without the sections."""
    short = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key if whole_keys else key.split('.', 1)[1]} {value}" for key, value in short.items())
