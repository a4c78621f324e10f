"""Searches for better parameters of fine-tuning: `python -m pipelines.tune`, with Optuna. docs/tuning.md.

Each trial is a process of `stages.finetune --trial` with a params file and a folder of its own. What is found is judged
on val alone: no trial opens the test split. The study lies in `.synset/tune/`, under a fingerprint of all that is not
searched (but the machine), so a search goes on where it was stopped, and never mixes with another one's trials. Several
workers (this command, in several terminals) share one study.
"""

import argparse
import fcntl
import hashlib
import io
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from pipelines.processes.stage_process import Stop, run_streamed, signals_to
from stages.params.finetune import Finetune
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.params.tune import SEARCHED, Distribution, Tune
from stages.registry.runs import PARENT, TrainingRun, search_run
from stages.runtime.command import StageError, run
from stages.runtime.files import sha256, write_text
from stages.runtime.fingerprint import dependencies_of
from stages.runtime.params_file import ParamsError, check, load_section, params_path, read_params

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)
FOLDER = Path(".synset/tune")
COMMAND = (sys.executable, "-m", "stages.finetune", "--trial")
FLOAT = "tag:yaml.org,2002:float"
FAILURES = 3
"""Trials that fail one after the other, before any has ended well, stop the search: it would go on for ever."""


def main() -> None:
    """One worker: trials until the study has as many as wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="in all, over all workers; default: tune.trials of params.yaml")
    parser.add_argument("--space", type=Path, metavar="FILE", help="YAML, instead of tune.space of params.yaml")
    options = parser.parse_args()
    tune = _tune(options.trials, options.space)
    search(tune, COMMAND)


def _tune(trials: int | None, space: Path | None) -> Tune:
    tune = load_section("tune", Tune)
    changes: dict[str, Any] = {"trials": trials} if trials is not None else {}
    if space:
        try:
            changes["space"] = yaml.safe_load(space.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ParamsError(f"{space} cannot be read as YAML: {error}") from None
    return check("tune", {**tune.model_dump(), **changes}, Tune, space if space else None)


def search(tune: Tune, command: Sequence[str]) -> None:
    """Runs trials, and writes what was found beside the study.

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
    _check_space(params, tune.space)
    _check_metric(params, tune)
    folder = FOLDER / _fingerprint(params, tune)
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(folder, tune)
    parent = search_run({"tune": tune.model_dump()}, folder.name)
    logger.info("tune: study %s, %d of %d trials are done", folder, len(_done(study)), tune.trials)
    stop = Stop()
    with signals_to(stop):
        while not stop.asked():
            with _alone(folder):
                _take_up(study, folder)
                if len(_counting(study)) >= tune.trials:
                    break
                _stop_where_all_fail(study)
                trial = _ask(study, tune)
                held = _hold(folder, trial.number)
            try:
                _run_trial(study, trial, folder, held, tune, params, command, parent.run_id, stop)
            finally:
                held.close()
    if stop.asked():
        raise StageError(f"{stop.reason}; the same command goes on with it")
    with _alone(folder):  # another worker may end in this moment
        _finish(study, folder, tune, text, parent)


def _check_space(params: dict[str, Any], space: Mapping[str, Distribution]) -> None:
    """Every key exists and may have every value that is tried first: both ends, or each choice."""
    for key, values in space.items():
        ends = values.choices if values.choices is not None else [values.low, values.high]
        for value in ends:
            _checked(_with(params, {key: value}))


def _check_metric(params: dict[str, Any], tune: Tune) -> None:
    """Every trial will measure what it is judged by."""
    indexes = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in dependencies_of("finetune")
        if path.name == "index.json"
    ]
    if not any(index["splits"].get("val", {}).get("count") for index in indexes):
        raise StageError(
            f"`tune.metric` is {tune.metric}, but val has no images; set `split.val_fraction` above 0, and "
            "`dvc repro pretrain shard`"
        )
    searched = any(key.startswith("finetune.adversarial") for key in tune.space)
    if tune.metric == "val_robust_top1" and not params["finetune"].get("adversarial") and not searched:
        raise ParamsError("`tune.metric` is val_robust_top1, which is measured where `finetune.adversarial` is set")


def _checked(params: dict[str, Any]) -> Finetune:
    """The section `finetune`, where all that may be searched is valid."""
    check("model", params["model"], Model)
    check("training", params["training"], Training)
    return check("finetune", params["finetune"], Finetune)


def _with(params: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of params.yaml with other values at dotted keys."""
    changed = json.loads(json.dumps(params))
    _put(changed, values)
    return changed


def _put(params: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        *path, last = key.split(".")
        section = params
        for part in path:
            if section.get(part) is None:  # `adversarial: null`
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ParamsError(f"`tune.space`: `{key}` cannot be searched: `{part}` has no keys, it is {section!r}")
        section[last] = value


def _fingerprint(params: dict[str, Any], tune: Tune) -> str:
    """Of what decides a trial's figure but what is searched: data, backbone, code, sections, the space, the metric."""
    fixed = _with(params, dict.fromkeys(tune.space))
    parts: dict[str, Any] = {name: fixed[name] for name in SEARCHED}
    parts |= {"space": tune.model_dump()["space"], "metric": tune.metric, "seed": tune.seed, "prune": tune.prune_after}
    parts |= {"files": {path.as_posix(): sha256(path) for path in dependencies_of("finetune")}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _ask(study: "Study", tune: Tune) -> "Trial":
    """The next trial, by a sampler that is seeded by its number: so it is the same one after a stop, in any worker."""
    from optuna.samplers import TPESampler

    (seed,) = random.Random(f"{tune.seed} {len(_counting(study))}").sample(range(2**31), 1)
    study.sampler = TPESampler(seed=seed)
    return study.ask(_distributions(tune.space))


def _study(folder: Path, tune: Tune) -> "Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if tune.prune_after and "finetune.epochs" not in tune.space:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=tune.prune_after - 1)
    with _alone(folder):
        return optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}", study_name="finetune", load_if_exists=True, pruner=pruner,
            direction="maximize" if tune.maximises else "minimize",
        )  # fmt: skip


def _distributions(space: Mapping[str, Distribution]) -> "dict[str, BaseDistribution]":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

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


# -------------------------------------------------------------------------------------------------- workers and trials


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One worker at a time decides what is tried next."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hold(folder: Path, number: int) -> IO[str]:
    """A trial's own lock, which dies with its worker and the process that it started."""
    path = folder / str(number) / "lock"
    path.parent.mkdir(exist_ok=True)
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _take_up(study: "Study", folder: Path) -> None:
    """Trials of workers that died are asked for again, and go on from their checkpoints."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        try:
            held = _hold(folder, trial.number)
        except BlockingIOError:
            continue
        with held:
            if study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING:
                continue  # its worker ended it between our look and our hold
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={"goes on": _place(trial)})


def _place(trial: "Trial | FrozenTrial") -> int:
    """The name of a trial's folder: its number, or that of the trial which it goes on with."""
    return int(trial.user_attrs.get("goes on", trial.number))


def _done(study: "Study") -> "list[FrozenTrial]":
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED])


def _counting(study: "Study") -> "list[FrozenTrial]":
    """Trials that came to something, or are at it, or failed by themselves; not those of workers that died."""
    from optuna.trial import TrialState

    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) or "error" in trial.user_attrs
    ]


def _stop_where_all_fail(study: "Study") -> None:
    failed = [trial for trial in study.get_trials(deepcopy=False) if "error" in trial.user_attrs]
    if len(failed) >= FAILURES and not _done(study):
        raise StageError(f"the first {len(failed)} trials failed; the last one said: {failed[-1].user_attrs['error']}")


def _run_trial(
    study: "Study", trial: "Trial", folder: Path, held: IO[str], tune: Tune, params: dict[str, Any],
    command: Sequence[str], parent: str, stop: Stop,
) -> None:  # fmt: skip
    """Trains one trial, and tells the study how it ended."""
    from optuna.trial import TrialState

    place = folder / str(_place(trial))
    place.mkdir(exist_ok=True)
    try:
        recipe = _checked(_with(params, trial.params))
    except ParamsError as error:  # two values that do not go together
        _fail(study, trial, str(error))
        return
    write_text(place / "params.yaml", yaml.safe_dump(_with(params, trial.params), sort_keys=False))
    environment = os.environ | {"SYNSET_PARAMS": str(place / "params.yaml"), PARENT: parent}
    lines: list[str] = []
    watch = _Watch(trial, place / "finetuned/progress.jsonl", tune, recipe)
    both = Stop(also=lambda: stop.asked() or watch.should_stop(), every=1.0)
    shown = ", ".join(f"{key.split('.', 1)[1]} {_short(value)}" for key, value in trial.params.items())
    logger.info("trial %d: %s", trial.number, shown)
    code = run_streamed([*command, str(place)], lines.append, both, env=environment, pass_fds=[held.fileno()])
    write_text(place / "output.txt", "".join(f"{line}\n" for line in lines))
    if stop.asked():
        return  # stays as it is: the next worker takes it up
    watch.report()
    if watch.error:
        _fail(study, trial, watch.error)
    elif watch.pruned:
        study.tell(trial, state=TrialState.PRUNED)
        logger.info("trial %d: stopped after epoch %d, %s", trial.number, watch.epochs, watch.describe())
    elif code or watch.value is None:
        said = next((line for line in reversed(lines) if line.startswith("error")), f"ended with {code}")
        _fail(study, trial, f"{said} (all that it said: {place / 'output.txt'})")
    else:
        study.tell(trial, watch.value)
        logger.info("trial %d: %s", trial.number, watch.describe())
    shutil.rmtree(place / "finetuned", ignore_errors=True)  # its checkpoint
    shutil.rmtree(place / "model", ignore_errors=True)  # `dvc repro` makes it again


def _fail(study: "Study", trial: "Trial", words: str) -> None:
    from optuna.trial import TrialState

    trial.set_user_attr("error", words)
    study.tell(trial, state=TrialState.FAIL)
    logger.warning("trial %d failed: %s", trial.number, words)


class _Watch:
    """What a trial has written of its epochs, as far as it has been seen."""

    def __init__(self, trial: "Trial", progress: Path, tune: Tune, recipe: Finetune) -> None:
        self.trial, self.progress, self.tune, self.recipe = trial, progress, tune, recipe
        self.epochs = 0
        self.value: float | None = None
        """Of the weights that would be kept: the last epoch's, or under `patience` those of the best one."""
        self.pruned = False
        self.error = ""
        self._watched: float | None = None

    def should_stop(self) -> bool:
        """Reports new epochs; whether the trial is not worth going on with."""
        self.report()
        self.pruned = self.pruned or self.trial.should_prune()
        return self.pruned or bool(self.error)

    def report(self) -> None:
        """Tells the study of the epochs that it does not know yet."""
        if not self.progress.is_file():
            return
        epochs = [json.loads(line) for line in self.progress.read_text(encoding="utf-8").splitlines()]
        for epoch in epochs[self.epochs :]:
            if self.tune.metric not in epoch:
                self.error = (
                    f"`tune.metric` is {self.tune.metric}, which it does not measure ({_why(self.tune.metric)})"
                )
                return
            value = epoch[self.tune.metric]
            watched = epoch.get(self.recipe.monitor, 0.0)
            if not self.recipe.patience or self._watched is None or not self.recipe.better(self._watched, watched):
                self.value, self._watched = value, watched
            self.trial.report(value, int(epoch["epoch"]) - 1)
            self.epochs += 1

    def describe(self) -> str:
        """For people."""
        return f"{self.tune.metric} {self.value:.4f}" if self.value is not None else "no epoch was finished"


def _why(metric: str) -> str:
    return "no `finetune.adversarial`" if metric == "val_robust_top1" else "val has no images: `split.val_fraction`"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------ what was found


def _finish(study: "Study", folder: Path, tune: Tune, text: str, parent: TrainingRun) -> None:
    """The best trial as a params file, a table of the best ones, pictures of the search."""
    from optuna.trial import TrialState

    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not ended:
        raise StageError(f"no trial of {folder} ended well; see why they failed above")
    elsewhere = len(study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))
    if elsewhere:
        logger.info("tune: other workers are still at %d trials, which are not counted below", elsewhere)
    ranked = sorted(ended, key=lambda trial: trial.value or 0.0, reverse=tune.maximises)
    head = f"# params.yaml with the best of {len(ended)} trials: {tune.metric} {ranked[0].value:.4f} on val.\n"
    write_text(folder / "best.yaml", head + _rewritten(text, ranked[0].params))
    pictures = folder / "pictures"
    _draw(study, pictures)
    parent.log({f"best_{tune.metric}": float(ranked[0].value or 0.0), "trials": len(study.trials)}, 0)
    parent.log_artifacts(pictures)
    parent.finish("FINISHED")
    print(f"\n{tune.metric:>12}  trial  values")
    for trial in ranked[:5]:
        values = ", ".join(f"{key} {_short(value)}" for key, value in trial.params.items())
        print(f"{trial.value:>12.4f}  {_place(trial):>5}  {values}")
    print(f"\nto train with the best: cp {folder / 'best.yaml'} params.yaml && make repro")


def _rewritten(text: str, values: Mapping[str, Any]) -> str:
    """A params file with other values at dotted keys; its comments stay."""
    from ruamel.yaml import YAML

    keeping = YAML()
    keeping.preserve_quotes, keeping.width = True, 200
    null = "tag:yaml.org,2002:null"
    keeping.representer.add_representer(type(None), lambda writer, _: writer.represent_scalar(null, "null"))
    keeping.representer.add_representer(float, lambda writer, each: writer.represent_scalar(FLOAT, _written(each)))
    changed = keeping.load(text)
    _put(changed, values)
    written = io.StringIO()
    keeping.dump(changed, written)
    return written.getvalue()


def _written(value: float) -> str:
    """A number as all YAML readers take it: ruamel's `1e-05` is a string to PyYAML."""
    return yaml.safe_dump(value).split("\n")[0]


def _draw(study: "Study", folder: Path) -> None:
    import warnings

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.exceptions import ExperimentalWarning
    from optuna.visualization import matplotlib as drawn

    folder.mkdir(exist_ok=True)
    draw: dict[str, Any] = {"history": drawn.plot_optimization_history}
    if len({str(trial.params) for trial in study.get_trials(deepcopy=False) if trial.value is not None}) > 1:
        draw["importance"] = drawn.plot_param_importances
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for name, plot in draw.items():
            try:
                figure = plot(study).figure
            except (RuntimeError, ValueError) as error:  # all trials equally good: nothing is more important
                logger.warning("no picture of %s: %s", name, error)
                continue
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)


if __name__ == "__main__":
    run(main)
