"""The version in force, while the registry comes and goes."""

from pathlib import Path

import pytest

from pipelines.serving.version_in_force import VersionInForce
from stages.registry import versions
from stages.registry.client import open_client
from tests.pipelines.tiny_registry import NAME


def test_what_was_known_holds_while_the_registry_is_gone(
    registry: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes: list[bool] = []
    in_force = VersionInForce(NAME, 1, lambda: changes.append(True))
    in_force.read()
    assert in_force.was_read
    assert in_force.version is None
    assert "promote one" in in_force.message

    client = open_client()
    client.create_registered_model(NAME)
    client.create_model_version(NAME, str(registry))
    versions.set_alias(versions.list_versions(NAME)[0], "serving")
    in_force.read()
    assert in_force.version
    assert in_force.version.number == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registry}/gone/mlflow.db")
    caplog.clear()
    in_force.read()
    in_force.read()
    assert in_force.version.number == 1
    assert len(caplog.records) == 1  # said once
    assert "does not answer" in caplog.text

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registry}/mlflow.db")
    versions.delete_alias(NAME, "serving")
    in_force.read()
    assert in_force.version.number == 1
    assert "no version of tiny is in force any more" in in_force.message
    assert len(changes) == 5
