"""The table at the end of `make repro`, and what `make ui` prints."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import summary, ui
from stages.registry import lineage, versions
from stages.registry.client import open_client
from stages.registry.runs import training_run
from stages.runtime.files import write_json

ROOT = Path(__file__).parents[1]
METRICS = {
    "data": {"accepted": 2_980, "quarantined": 21},
    "test": {"top1": 0.9125, "top1_low": 0.887, "top1_high": 0.933},
    "before": {"top1": 0.712, "top1_low": None, "top1_high": None},
    "scratch": {"top1": None},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], None]) -> Iterator[Path]:
    """A finished run with one version, and one without."""
    folder = tmp_path_factory.mktemp("summary")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        new_database(folder)
        (folder / "params.yaml").write_text("register: {name: tents}\n")
        for sha in ("one", "two"):
            with training_run("finetune", {}, {"model.sha256": sha}):
                pass
        run = lineage.find_run("one")
        assert run
        model = open_client().create_logged_model(run.info.experiment_id, "m", source_run_id=run.info.run_id)
        version = versions.create_version(
            "tents", "About", f"models:/{model.model_id}", run.info.run_id, {"gate": "passed"}, "Card"
        )
        versions.finish_version(version, "one")
        versions.set_alias(version, "challenger")
        yield folder


def test_before_anything_ran_the_table_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("register: {name: tents}\n")
    assert summary.summary_rows() == [("model", "tents: not registered yet"), ("look at it", "make ui")]


def test_the_table_tells_what_came_out(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tree / "reports/metrics.json", METRICS)
    write_json(tree / "models/registered.json", {"name": "tents", "sha256": "one"})
    (tree / "reports/report.html").write_text("<html>")
    assert summary.summary_rows() == [
        ("images", "2,980 accepted, 21 quarantined"),
        ("top-1 before fine-tuning", "71.2 %"),
        ("top-1 after fine-tuning", "91.2 %  (88.7 – 93.3)"),
        ("model", "tents, version 1 @challenger"),
        ("gate", "passed"),
        ("look at it", "make ui"),
        ("", "reports/report.html"),
    ]


def test_a_model_of_another_registry_is_named_with_the_way_in(tree: Path) -> None:
    write_json(tree / "models/registered.json", {"name": "tents", "sha256": "elsewhere"})
    rows = dict(summary.summary_rows())
    assert "not in this registry" in rows["model"]
    assert "dvc repro -f -s register" in rows["model"]


def test_links_lead_to_the_newest_version_its_run_and_the_comparison(tree: Path) -> None:
    found = dict(ui.links("http://h:1", "tents"))
    assert list(found) == ["all versions", "version 1", "its run", "comparison of runs"]
    run = lineage.find_run("one")
    assert run
    assert found["version 1"] == "http://h:1/#/models/tents/versions/1"
    assert found["its run"].endswith(run.info.run_id)


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < ui.free_port(port) <= port + 100


@pytest.mark.slow
def test_the_server_starts_shows_the_links_and_ends_with_all_its_processes(tree: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipelines.ui", "--port", "5600"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    address = next(line for line in lines if line.startswith("version 1")).split()[-1].split("/#")[0]
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    time.sleep(0.5)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{address}/health")
    assert not (tree / "mlruns").exists()
