"""One worker of a search: takes trials until the study has as many as wanted, then writes the results."""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from pipelines.processes.stage_process import Stop, signals_to
from pipelines.tuning.results import write_results
from pipelines.tuning.space import check_metric, check_space, with_values
from pipelines.tuning.study import counted, done, hold, next_trial, open_study, requeue_abandoned, stop_where_all_fail
from pipelines.tuning.trial import Search, run_trial
from stages.params.tune import SEARCHED, Tune
from stages.registry.runs import search_run
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import sha256
from stages.runtime.fingerprint import dependencies_of
from stages.runtime.locks import locked_folder
from stages.runtime.params_file import ParamsError, params_path, read_params

logger = logging.getLogger(__name__)


def search(tune: Tune, command: Sequence[str]) -> None:
    """Runs trials, and writes the results beside the study.

    Args:
        command: starts a trial; its folder is added.

    Raises:
        StageError: nothing to search, inputs are missing, or trials only fail.
    """
    if not tune.space:
        raise ParamsError(
            "params.yaml: `tune.space` is empty; name a key and its values: `finetune.lr: {low: 0.01, high: 0.1}`"
        )
    text, params = params_path().read_text(encoding="utf-8"), read_params()  # as they are now, whoever edits them later
    check_space(params, tune.space)
    check_metric(params, tune)
    folder = layout.TUNE / _fingerprint(params, tune)
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(folder, tune)
    run = search_run({"tune": tune.model_dump()}, folder.name)
    logger.info("tune: study %s, %d of %d trials are done", folder, len(done(study)), tune.trials)
    stop = Stop()
    with signals_to(stop):
        _run_trials(Search(study, folder, tune, params, command, run.run_id, stop))
    if stop.requested():
        raise StageError(f"{stop.reason}; the same command goes on with it")
    with locked_folder(folder):  # another worker may end in this moment
        write_results(study, folder, tune, text, run)


def _run_trials(search: Search) -> None:
    while not search.stop.requested():
        with locked_folder(search.folder):  # one worker at a time decides what is tried next
            requeue_abandoned(search.study, search.folder)
            if len(counted(search.study)) >= search.tune.trials:
                return
            stop_where_all_fail(search.study)
            trial = next_trial(search.study, search.tune)
            held = hold(search.folder, trial.number)
        assert held is not None  # the trial is new
        with held:
            run_trial(search, trial, held)


def _fingerprint(params: dict[str, Any], tune: Tune) -> str:
    """Everything that decides a trial's metric, except what is searched: data, backbone, code, params, the space."""
    fixed = with_values(params, dict.fromkeys(tune.space))
    parts: dict[str, Any] = {name: fixed[name] for name in SEARCHED}
    parts |= {"space": tune.model_dump()["space"], "metric": tune.metric, "seed": tune.seed, "prune": tune.prune_after}
    parts |= {"files": {path.as_posix(): sha256(path) for path in dependencies_of("finetune")}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
