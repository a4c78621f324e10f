"""Where MLflow is, a client of it, and what its failures become. MLflow is imported when a client is first opened."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.registry.mlflow_types import MlflowClient
from stages.runtime.command import StageError
from stages.runtime.locks import locked_folder

SQLITE = "sqlite:///"


def enabled() -> bool:
    """False with SYNSET_TRACKING=off."""
    return os.environ.get("SYNSET_TRACKING", "on").lower() not in ("off", "0", "false")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the repository root (the working directory of every stage)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path.cwd() / 'mlflow.db'}"


def database(uri: str) -> Path | None:
    """The file of an SQLite database; None for a server or another database."""
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def is_server(uri: str) -> bool:
    """Whether `uri` names a running MLflow server rather than a database."""
    return uri.startswith(("http://", "https://"))


def artifact_root(uri: str) -> str | None:
    """Where a database's artifacts lie: mlartifacts/ beside it. None for a server, which decides itself."""
    if is_server(uri):
        return None
    if set_by_hand := os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT"):
        return set_by_hand
    file = database(uri)
    return str((file.parent if file else Path.cwd()) / "mlartifacts")


def open_client() -> MlflowClient:
    """A client of `tracking_uri()`. A new SQLite file takes seconds (migrations)."""
    from stages.registry.mlflow_setup import mlflow

    uri = tracking_uri()
    if root := artifact_root(uri):
        # The server's own variable. Without it, MLflow would make ./mlruns the artifact root of a new database.
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = root
    file = database(uri)
    if file and not file.parent.is_dir():  # checked here because MLflow retries a file that it cannot open for minutes
        raise mlflow.MlflowException(f"there is no folder {file.parent} to keep the database in")
    mlflow.set_tracking_uri(uri)
    if not file:
        return mlflow.MlflowClient(uri)
    # One process at a time: two that create the file would each migrate what the other had begun.
    with locked_folder(file.parent, optional=True):
        return mlflow.MlflowClient(uri)


def mlflow_errors() -> tuple[type[Exception], ...]:
    """What MLflow raises when its server or database fails."""
    from stages.registry.mlflow_setup import ERRORS

    return ERRORS


def is_missing(error: Exception) -> bool:
    """Whether MLflow says by `error` that a run or a file does not exist."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"


@contextmanager
def reachable() -> Iterator[None]:
    """Turns MLflow's errors into one message for a person, for callers that cannot go on without the registry.

    Raises:
        StageError: the server or the database failed.
    """
    try:
        yield
    except mlflow_errors() as error:
        raise StageError(
            f"MLflow at {tracking_uri()} failed: {reason(error)}. Start it again, and run this again"
        ) from error


def reason(error: BaseException) -> str:
    """The first cause in one line: MLflow wraps `connection refused` four times over."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(str(error).split())[:200] or type(error).__name__
