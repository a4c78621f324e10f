"""The results of a search: the best trial as a params file, a table of the best ones, plots, and the run in MLflow."""

import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import TrialState
from optuna.visualization.matplotlib import plot_optimization_history, plot_param_importances
from ruamel.yaml import YAML

from pipelines.tuning.space import put
from pipelines.tuning.study import folder_number
from pipelines.tuning.trial import in_words
from stages.params.tune import Tune
from stages.registry.runs import TrainingRun
from stages.runtime.command import StageError
from stages.runtime.files import write_text
from stages.runtime.yaml_text import dump_yaml

logger = logging.getLogger(__name__)
_FLOAT = "tag:yaml.org,2002:float"


def write_results(study: Study, folder: Path, tune: Tune, text: str, run: TrainingRun) -> None:
    """Writes best.yaml and pictures/ into the folder, finishes the run, prints the best trials.

    Args:
        text: params.yaml as it was when the search began.

    Raises:
        StageError: no trial ended well.
    """
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not ended:
        raise StageError(f"no trial of {folder} ended well; see why they failed above")
    elsewhere = len(study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))
    if elsewhere:
        logger.info("tune: other workers are still at %d trials, which are not counted below", elsewhere)
    ranked = sorted(ended, key=lambda trial: trial.value or 0.0, reverse=tune.maximises)
    head = f"# params.yaml with the best of {len(ended)} trials: {tune.metric} {ranked[0].value:.4f} on val.\n"
    write_text(folder / "best.yaml", head + _text_with(text, ranked[0].params))
    pictures = folder / "pictures"
    _draw(study, pictures)
    run.log({f"best_{tune.metric}": float(ranked[0].value or 0.0), "trials": len(study.trials)}, 0)
    run.log_artifacts(pictures)
    run.finish("FINISHED")
    print(f"\n{tune.metric:>12}  trial  values")
    for trial in ranked[:5]:
        print(f"{trial.value:>12.4f}  {folder_number(trial):>5}  {in_words(trial.params)}")
    print(f"\nto train with the best: cp {folder / 'best.yaml'} params.yaml && make repro")


def _text_with(text: str, values: Mapping[str, Any]) -> str:
    """A params file with other values at dotted keys; its comments stay."""
    keeping = YAML()
    keeping.preserve_quotes, keeping.width = True, 200
    keeping.representer.add_representer(float, lambda writer, each: writer.represent_scalar(_FLOAT, _number(each)))
    changed = keeping.load(text)
    put(changed, values)
    written = io.StringIO()
    keeping.dump(changed, written)
    return written.getvalue()


def _number(value: float) -> str:
    """A number that every YAML reader takes as one: ruamel's `1e-05` is a string to PyYAML."""
    return dump_yaml(value).split("\n")[0]


def _draw(study: Study, folder: Path) -> None:
    matplotlib.use("Agg")
    folder.mkdir(exist_ok=True)
    plots: dict[str, Any] = {"history": plot_optimization_history}
    if len({str(trial.params) for trial in study.get_trials(deepcopy=False) if trial.value is not None}) > 1:
        plots["importance"] = plot_param_importances
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for name, plot in plots.items():
            try:
                figure = plot(study).figure
            except (RuntimeError, ValueError) as error:  # all trials equally good: nothing is more important
                logger.warning("no picture of %s: %s", name, error)
                continue
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
