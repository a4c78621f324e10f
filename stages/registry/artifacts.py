"""Files that runs and versions keep in MLflow: writing them, and getting them back."""

from pathlib import Path

from stages.registry.client import is_missing, open_client
from stages.registry.mlflow_types import Run
from stages.registry.versions import Version
from stages.runtime.command import StageError
from stages.runtime.files import sha256


def log_files(run: Run, folder: Path) -> None:
    """All files of `folder`, at the root of the run's artifacts."""
    open_client().log_artifacts(run.info.run_id, str(folder))


def download(run_id: str, path: str, folder: Path) -> Path | None:
    """A file of a run's artifacts, copied into `folder`; None where there is no such file, or no such run any more."""
    if not run_id:
        return None
    client = open_client()
    parent = str(Path(path).parent)
    try:
        if path not in {each.path for each in client.list_artifacts(run_id, None if parent == "." else parent)}:
            return None
        return Path(client.download_artifacts(run_id, path, str(folder)))
    except Exception as error:
        if is_missing(error):
            return None
        raise


def download_model(version: Version, folder: Path) -> None:
    """Copies the files of a registered model into `folder`, which exists. Nothing of them is loaded.

    Raises:
        StageError: they cannot be had.
    """
    from stages.registry.mlflow_setup import mlflow

    open_client()
    try:
        mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.number}", dst_path=str(folder))
    except Exception as error:  # MLflow's, the object store's, the disk's
        raise StageError(f"version {version.number} cannot be downloaded: {type(error).__name__}: {error}") from error
    if not any(folder.iterdir()):  # MLflow only logs that there was nothing
        raise StageError(f"version {version.number} cannot be downloaded: the registry holds no file of it")


def weights_sha256(model: Path) -> str:
    """sha256 of the weights in the folder of a downloaded model; empty where it holds none."""
    found = sorted(model.rglob("model.safetensors"))
    return sha256(found[0]) if found else ""
