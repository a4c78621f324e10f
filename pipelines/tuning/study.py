"""The Optuna study that several workers share: its trials, and who may run one."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from stages.params.tune import Distribution, Tune
from stages.runtime.command import StageError
from stages.runtime.locks import lock, locked_folder

FAILURES = 3
"""Trials that fail one after the other, before any has succeeded, stop the search: it would go on for ever."""


def open_study(folder: Path, tune: Tune) -> Study:
    """The study in a folder, with the trials that it has already."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if tune.prune_after and "finetune.epochs" not in tune.space:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=tune.prune_after - 1)
    with locked_folder(folder):
        return optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name="finetune",
            load_if_exists=True,
            pruner=pruner,
            direction="maximize" if tune.maximises else "minimize",
        )


def next_trial(study: Study, tune: Tune) -> Trial:
    """The next trial. The sampler is seeded by its number, so it is the same one after a stop, in any worker."""
    (seed,) = random.Random(f"{tune.seed} {len(counted(study))}").sample(range(2**31), 1)
    study.sampler = TPESampler(seed=seed)
    return study.ask(_distributions(tune.space))


def _distributions(space: Mapping[str, Distribution]) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {}
    for key, values in space.items():
        if values.choices is not None:
            found[key] = CategoricalDistribution(values.choices)
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[key] = IntDistribution(values.low, values.high, log=values.log, step=int(values.step or 1))
        else:
            assert values.low is not None and values.high is not None
            found[key] = FloatDistribution(values.low, values.high, log=values.log, step=values.step)
    return found


def hold(folder: Path, number: int) -> IO[str] | None:
    """A trial's own lock, held until its worker and the process that the worker started have ended.

    Returns:
        The open file; None where another process holds it.
    """
    path = folder / str(number) / "lock"
    path.parent.mkdir(exist_ok=True)
    file = path.open("w")
    if lock(file, patience=0):
        return file
    file.close()
    return None


def requeue_abandoned(study: Study, folder: Path) -> None:
    """Queues the trials of workers that died again; they go on from their checkpoints."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        held = hold(folder, trial.number)
        if held is None:
            continue
        with held:
            if study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING:
                continue  # its worker ended it before we had the lock
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={"goes on": folder_number(trial)})


def folder_number(trial: Trial | FrozenTrial) -> int:
    """The name of a trial's folder: its number, or that of the abandoned trial that it goes on with."""
    return int(trial.user_attrs.get("goes on", trial.number))


def done(study: Study) -> list[FrozenTrial]:
    """Trials that were completed or pruned."""
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED])


def counted(study: Study) -> list[FrozenTrial]:
    """Trials that are done, running, or failed by themselves; not those of workers that died."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) or "error" in trial.user_attrs
    ]


def stop_where_all_fail(study: Study) -> None:
    """Raises StageError after too many failures without a success."""
    failed = [trial for trial in study.get_trials(deepcopy=False) if "error" in trial.user_attrs]
    if len(failed) >= FAILURES and not done(study):
        raise StageError(f"the first {len(failed)} trials failed; the last one said: {failed[-1].user_attrs['error']}")
