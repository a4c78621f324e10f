"""Fixtures of several tests."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_database: Callable[[Path], None]) -> Path:
    """An MLflow database of the test's own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    new_database(tmp_path)
    return tmp_path
