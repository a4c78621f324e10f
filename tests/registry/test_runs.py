"""Tracking on a real SQLite database: what a run holds, how it goes on, and that training never suffers from it."""

import fcntl
import json
import logging
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from stages.registry import lineage, recording, versions
from stages.registry.client import artifact_root, open_client, reachable, tracking_uri
from stages.registry.links import comparison_link, run_link, version_link
from stages.registry.runs import training_run
from stages.runtime.command import StageError
from stages.runtime.files import write_json


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], None]) -> Iterator[Path]:
    """A folder with one shard set and a new database."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        new_database(folder)
        index = {"batch": "target", "splits": {"train": {"count": 40}, "test": {"count": 9}}}
        write_json(folder / "data/shards/finetune/target/index.json", index)
        yield folder


@pytest.fixture(autouse=True)
def in_tree(tree: Path) -> None:
    """Every test runs there."""


def runs(fingerprint: str) -> list[Any]:
    experiment = open_client().get_experiment_by_name("synset/finetune")
    assert experiment
    return open_client().search_runs([experiment.experiment_id], f"tags.fingerprint = '{fingerprint}'")


def test_a_run_holds_params_curves_tags_and_the_identity_of_its_data(tree: Path) -> None:
    (tree / "report").mkdir()
    (tree / "report/metrics.json").write_text("{}")
    params = {"finetune": {"lr": 0.1, "patience": None}, "model": {"architecture": "resnet18"}}
    with training_run("finetune", params, {"fingerprint": "whole"}) as run:
        run.log({"train_loss": 2.0, "val_top1": 0.25}, 0)
        run.log({"train_loss": 1.0, "val_top1": 0.5}, 1)
        run.set_tags({"model.sha256": "abc"})
        run.log_artifacts(tree / "report")
    found = lineage.find_run("abc")
    assert found
    assert found.inputs
    assert found.info.status == "FINISHED"
    assert found.data.params == {"finetune.lr": "0.1", "finetune.patience": "None", "model.architecture": "resnet18"}
    assert found.data.tags["stage"] == "finetune"
    history = open_client().get_metric_history(found.info.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 2.0), (1, 1.0)]
    (data,) = found.inputs.dataset_inputs
    write_json(tree / "data/shards/finetune/.target.tmp/index.json", {"batch": "half-made"})
    (shard_set,) = lineage.training_data("finetune")
    assert data.dataset.name == "target"
    assert json.loads(data.dataset.profile or "") == {"sha256": shard_set.sha256, "train": 40, "test": 9}
    assert list((tree / "mlartifacts").rglob("report/metrics.json"))


def test_only_the_database_and_mlartifacts_are_written(tree: Path) -> None:
    open_client().search_experiments()
    assert {path.name for path in tree.iterdir()} <= {"data", "report", "mlflow.db", "mlartifacts"}


def test_system_metrics_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SYSTEM_METRICS_EVERY", 0.05)
    with training_run("finetune", {}, {"fingerprint": "system"}) as run:
        assert run.run_id
        while not [name for name in runs("system")[0].data.metrics if name.startswith("system/")]:
            time.sleep(0.05)
    assert "system/cpu_utilization_percentage" in runs("system")[0].data.metrics


def test_a_killed_run_goes_on_and_a_finished_one_does_not() -> None:
    with pytest.raises(KeyboardInterrupt), training_run("finetune", {}, {"fingerprint": "killed"}) as first:
        raise KeyboardInterrupt
    assert runs("killed")[0].info.status == "KILLED"
    # Other params than before (a new key with a default) are no reason to lose the run.
    with training_run("finetune", {"new": 1}, {"fingerprint": "killed"}, resumed=True) as second:
        assert second.run_id == first.run_id
    assert runs("killed")[0].info.status == "FINISHED"
    with training_run("finetune", {}, {"fingerprint": "killed"}, resumed=True) as third:
        assert third.run_id != first.run_id


def test_the_run_of_another_machine_is_left_alone() -> None:
    with (
        training_run("finetune", {}, {"fingerprint": "twice"}) as elsewhere,
        training_run("finetune", {}, {"fingerprint": "twice"}) as here,
    ):
        assert here.run_id != elsewhere.run_id


def test_an_error_of_training_is_raised_and_the_run_is_marked() -> None:
    with pytest.raises(StageError), training_run("finetune", {}, {"fingerprint": "failed"}):
        raise StageError("no data")
    assert runs("failed")[0].info.status == "FAILED"


def test_switched_off_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNSET_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    with training_run("finetune", {}, {"fingerprint": "off"}) as run:
        run.log({"loss": 1.0}, 0)
        run.set_tags({"a": "b"})
        run.log_artifacts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_random_numbers_of_training_are_left_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    with training_run("finetune", {}, {"fingerprint": "random"}) as run:
        run.log({"loss": 1.0}, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]


def test_a_server_that_is_down_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    epochs = 0
    with caplog.at_level(logging.WARNING), training_run("finetune", {}, {"fingerprint": "down"}) as run:
        for epoch in range(3):
            run.log({"loss": 1.0}, epoch)
            epochs += 1
    assert epochs == 3
    (warning,) = caplog.messages
    assert "http://127.0.0.1:9 failed" in warning
    assert "refused" in warning
    with pytest.raises(StageError, match="refused"), reachable():
        versions.list_versions("any")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), shutil.Error([("a", "b", "read-only")])])
def test_a_disk_that_takes_no_artifacts_is_one_warning(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    (tree / "report").mkdir(exist_ok=True)
    monkeypatch.setattr(MlflowClient, "log_artifacts", fail)
    fingerprint = f"disk-{type(error).__name__}"
    with caplog.at_level(logging.WARNING), training_run("finetune", {}, {"fingerprint": fingerprint}) as run:
        run.log_artifacts(tree / "report")
        run.log({"loss": 1.0}, 0)
    (warning,) = caplog.messages
    assert "training goes on without it" in warning
    assert runs(fingerprint)[0].info.status == "FINISHED"
    assert runs(fingerprint)[0].data.metrics["loss"] == 1.0


@pytest.mark.parametrize("error", [AttributeError("no network counters"), requests.ConnectionError("refused")])
def test_system_metrics_that_cannot_be_had_are_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("mlflow.system_metrics.system_metrics_monitor.SystemMetricsMonitor.__init__", fail)
    fingerprint = f"monitor-{type(error).__name__}"
    with caplog.at_level(logging.WARNING), training_run("finetune", {}, {"fingerprint": fingerprint}) as run:
        run.log({"loss": 1.0}, 0)
    (warning,) = caplog.messages
    assert str(error) in warning
    assert runs(fingerprint)[0].data.metrics["loss"] == 1.0


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_server_that_fails_in_the_middle_costs_a_warning_and_at_most_the_curve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, comes_back: bool
) -> None:
    real, calls = MlflowClient.log_batch, []

    def failing(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 2 or (len(calls) > 2 and not comes_back):
            raise MlflowException("restarting")
        return real(self, *arguments, **options)

    fingerprint = f"middle-{comes_back}"
    with caplog.at_level(logging.WARNING), training_run("finetune", {}, {"fingerprint": fingerprint}) as run:
        monkeypatch.setattr(MlflowClient, "log_batch", failing)
        for epoch in range(4):
            run.log({"loss": float(epoch)}, epoch)
        assert len(calls) == 2  # no waiting for a dead server at every epoch
    assert sum("training goes on" in message for message in caplog.messages) == 1
    history = open_client().get_metric_history(run.run_id, "loss")
    assert [metric.step for metric in history] == ([0, 1, 2, 3] if comes_back else [0])


def test_a_wrong_folder_for_the_database_is_known_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/at/all/mlflow.db")
    with training_run("finetune", {}, {"fingerprint": "nowhere"}):
        pass
    assert "there is no folder /nowhere/at/all" in caplog.text


def test_who_opens_a_database_waits_for_who_is_making_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    opened: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(mlflow, "MlflowClient", opened.append)
    monkeypatch.setattr(mlflow, "set_tracking_uri", lambda uri: None)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    thread = threading.Thread(target=open_client)
    thread.start()
    thread.join(timeout=0.5)
    assert thread.is_alive()
    assert opened == []
    os.close(other)
    thread.join()
    assert opened == [f"sqlite:///{tmp_path}/mlflow.db"]


def test_versions_are_found_by_weights_alias_and_age() -> None:
    with training_run("finetune", {}, {"fingerprint": "versions"}) as run:
        pass
    client = open_client()
    made = []
    for sha in ("one", "two"):
        model = client.create_logged_model(runs("versions")[0].info.experiment_id, "m", source_run_id=run.run_id)
        source = f"models:/{model.model_id}"
        version = versions.create_version("tents", "About", source, run.run_id, {"gate": "x"}, "Card")
        versions.finish_version(version, sha)
        made.append(version)
    versions.set_alias(made[0], "champion")
    assert [version.number for version in versions.list_versions("tents")] == [2, 1]
    found = versions.find_version("tents", "one")
    assert found
    assert (found.number, found.aliases, found.tags["gate"]) == (1, ("champion",), "x")
    assert versions.version_by_alias("tents", "champion") == found
    assert versions.version_by_alias("tents", "serving") is None
    assert versions.find_version("tents", "three") is None
    assert versions.list_versions("nothing-of-this-name") == []


def test_git_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lineage.git_tags() == {}
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert lineage.git_tags() == {}  # no commit yet
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = lineage.git_tags()
    assert list(clean) == ["git.commit"]
    for written_by_repro in ("dvc.lock", "reports/metrics.json", "reports/plots/loss.csv"):
        (tmp_path / written_by_repro).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / written_by_repro).write_text("new")
    assert lineage.git_tags() == clean
    (tmp_path / "file").write_text("2")
    assert lineage.git_tags() == clean | {"git.dirty": "true"}
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert lineage.git_tags() == {}  # another repository's commit says nothing about this folder


def test_artifacts_lie_beside_the_database(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", raising=False)
    assert artifact_root(tracking_uri()) == str(tree / "mlartifacts")
    assert artifact_root("sqlite:////elsewhere/mlflow.db") == "/elsewhere/mlartifacts"
    assert artifact_root("http://server:5000") is None


def test_links_lead_to_pages_of_the_ui() -> None:
    first, second = runs("killed")
    ids = first.info.run_id, second.info.run_id
    assert run_link(first, "http://h:1") == f"http://h:1/#/experiments/1/runs/{ids[0]}"
    assert version_link("a b", 3) == "/#/models/a%20b/versions/3"
    assert all(each in comparison_link([first, second]) for each in ids)
