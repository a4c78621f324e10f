"""The model that is logged with a run, before it becomes a version."""

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.registry.client import open_client
from stages.registry.mlflow_setup import mlflow
from stages.registry.mlflow_types import MlflowClient, Run


def log_model(
    run: Run,
    code: Path,
    folder: Path,
    output: Mapping[str, str],
    requirements: Sequence[str],
    tags: Mapping[str, str],
) -> str:
    """Logs a pyfunc model with the run; returns its URI (models:/m-...). What an earlier try left there is taken out.

    Args:
        code: a file of Python, "models from code": nothing is pickled.
        folder: its artifact `model`, weights and all.
        output: column to element type of its answer; each is a list per image.
    """
    client = open_client()
    _delete_models(client, run, tags)
    types = mlflow.types.schema
    signature = mlflow.models.ModelSignature(
        inputs=types.Schema([types.ColSpec(types.DataType.binary, "image")]),
        outputs=types.Schema([types.ColSpec(types.Array(types.DataType[kind]), name) for name, kind in output.items()]),
        params=types.ParamSchema([types.ParamSpec("top_k", types.DataType.long, 5)]),
    )
    # Made first, in the run's experiment: Model.log alone would put it into the one called Default.
    logged = client.create_logged_model(
        run.info.experiment_id, "model", source_run_id=run.info.run_id, tags=dict(tags), params=dict(run.data.params)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*An input example was not provided")  # the signature says all
        # Not mlflow.pyfunc.log_model: that one starts the run again, and would move its end to now. `step` keeps
        # MLflow from copying the first epoch's metrics (step 0) to the model.
        mlflow.models.Model.log(
            None,
            flavor=mlflow.pyfunc,
            name="model",
            model_id=logged.model_id,
            run_id=run.info.run_id,
            step=1_000_000,
            python_model=str(code),
            artifacts={"model": str(folder)},
            signature=signature,
            pip_requirements=list(requirements),
        )
    return f"models:/{logged.model_id}"


def delete_model(source: str) -> None:
    """Takes a logged model (models:/m-...) out again."""
    open_client().delete_logged_model(source.removeprefix("models:/"))


def _delete_models(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> None:
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    # Under whatever name: the same weights may be registered under several.
    registered = {version.source for version in client.search_model_versions(f"run_id = '{run.info.run_id}'")}
    for model in found:
        if tags.items() <= model.tags.items() and f"models:/{model.model_id}" not in registered:
            client.delete_logged_model(model.model_id)


def log_metrics(run: Run, metrics: Mapping[str, float], source: str) -> None:
    """Figures of a finished run, shown with its logged model too. Those that are no numbers are left out."""
    now, model_id = int(time.time() * 1000), source.removeprefix("models:/")
    rows = [
        mlflow.entities.Metric(name, float(value), now, 0, model_id=model_id, run_id=run.info.run_id)
        for name, value in metrics.items()
        if isinstance(value, int | float)
    ]
    for start in range(0, len(rows), 1000):  # the most that a request may carry
        open_client().log_batch(run.info.run_id, metrics=rows[start : start + 1000], synchronous=True)
