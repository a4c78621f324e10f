"""Addresses of pages in MLflow's UI.

MLflow opens in its GenAI mode, which has no link to the models: hence deep links. Without a server's address they are
relative, and lead from one page of the UI to another, wherever it runs.
"""

import json
from collections.abc import Sequence
from urllib.parse import quote

from stages.registry.mlflow_types import Run


def run_link(run: Run, server: str = "") -> str:
    """The page of a run."""
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def artifact_link(run: Run, path: str, server: str = "") -> str:
    """The page of a run's artifact, shown in place where it is HTML."""
    return f"{run_link(run, server)}/artifacts/{quote(path)}"


def version_link(name: str, number: int, server: str = "") -> str:
    """The page of a version of a model."""
    return f"{server}/#/models/{quote(name)}/versions/{number}"


def comparison_link(runs: Sequence[Run], server: str = "") -> str:
    """The page that compares runs side by side."""
    experiments = sorted({run.info.experiment_id for run in runs})
    which = {"runs": [run.info.run_id for run in runs], "experiments": experiments}
    return f"{server}/#/compare-runs?" + "&".join(f"{key}={quote(json.dumps(value))}" for key, value in which.items())
