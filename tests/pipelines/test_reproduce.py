"""`python -m pipelines.reproduce` for real: Prefect and DVC over a project of tiny stages."""

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.processes.flow_run import stage_names
from tests.pipelines.processes.test_stage_process import ROOT, lives
from tests.workspace import text_of

STAGES = ["ingest", "scan", "evaluate", "register"]


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: the first start of Prefect's own API makes a database, and takes half a minute."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A DVC project with some of Synset's stages; `ingest` is a group of two."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    stages: dict[str, Any] = {
        "ingest": {
            "foreach": ["one", "two"],
            "do": {
                "cmd": "echo reading ${item} && printf '1 %%\\r100 %% ${item}\\n' && echo > ${item}",
                "outs": ["${item}"],
            },
        }
    }
    for before, stage in itertools.pairwise(STAGES):
        deps = ["one", "two"] if before == "ingest" else [before]
        stages[stage] = {"cmd": f"cp {deps[0]} {stage}", "deps": deps, "outs": [stage]}
    metrics = json.dumps({"data": {"accepted": 1234, "quarantined": 5}, "test": {"top1": 0.875}})
    stages["evaluate"]["cmd"] = f"mkdir -p reports && echo '{metrics}' > reports/metrics.json && cp scan evaluate"
    write_graph(tmp_path, stages)
    return tmp_path


def write_graph(project: Path, stages: dict[str, Any]) -> None:
    """dvc.yaml, its stages in the order given."""
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))


def change(project: Path, stage: str, cmd: str) -> None:
    """Another command for one stage."""
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    stages[stage]["cmd"] = cmd
    write_graph(project, stages)


def start(project: Path, prefect_home: Path) -> "subprocess.Popen[str]":
    """The flow, leader of a process group as in a terminal."""
    own = {"PREFECT_HOME": str(prefect_home), "DVC_SITE_CACHE_DIR": str(project / ".dvc/site"), "PYTHONPATH": str(ROOT)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PYTHONDONTWRITE"))}
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.reproduce"],
        cwd=project,
        env=kept | own,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def recorded(prefect_home: Path, query: str) -> list[tuple[Any, ...]]:
    """Rows of Prefect's database."""
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        return database.execute(query).fetchall()


LAST_RUN = "(select id from flow_run order by created desc limit 1)"
LAST_STATE = f"select type, message from flow_run_state where flow_run_id = {LAST_RUN} order by timestamp desc limit 1"


def test_a_flow_runs_every_stage_and_shows_what_it_did(project: Path, prefect_home: Path) -> None:
    flow = start(project, prefect_home)
    output = flow.communicate()[0]
    assert flow.returncode == 0, output
    assert (project / "register").exists()

    tasks = recorded(
        prefect_home, f"select name, state_type from task_run where flow_run_id = {LAST_RUN} order by created"
    )
    assert tasks == [(stage, "COMPLETED") for stage in STAGES]
    logged = [row[0] for row in recorded(prefect_home, f"select message from log where flow_run_id = {LAST_RUN}")]
    assert {"reading one", "reading two", "100 % one", "> cp one scan"} <= set(logged)

    shown = dict(recorded(prefect_home, f"select key, data from artifact where flow_run_id = {LAST_RUN}"))
    durations = json.loads(json.loads(shown["durations"]))
    assert [row["stage"] for row in durations] == STAGES
    assert all(row["seconds"] > 0 and row["ended"] == "ran" for row in durations)
    assert "1,234 accepted, 5 quarantined" in shown["result"]
    assert "87.5 %" in shown["result"]


def test_a_stage_that_fails_ends_the_flow_with_its_last_words(project: Path, prefect_home: Path) -> None:
    change(project, "scan", "echo working; echo 'error: one.tar is damaged; dvc checkout restores it' >&2; exit 1")
    flow = start(project, prefect_home)
    output = flow.communicate()[0]
    assert flow.returncode == 1, output
    assert "\nerror: scan: one.tar is damaged; dvc checkout restores it\n" in output
    assert recorded(prefect_home, LAST_STATE) == [("FAILED", "scan: one.tar is damaged; dvc checkout restores it")]
    assert not (project / "evaluate").exists()


def test_ctrl_c_stops_everything_that_the_stage_started(project: Path, prefect_home: Path) -> None:
    change(project, "scan", f"sleep 300 & echo $! > {project}/pid; wait; cp one scan")
    flow = start(project, prefect_home)
    grandchild = int(text_of(project / "pid", flow))
    assert lives(grandchild)
    os.killpg(flow.pid, signal.SIGINT)  # what a terminal sends: to the flow and to Prefect's own API
    output = flow.communicate()[0]
    assert flow.returncode == 130, output
    assert not lives(grandchild)
    assert recorded(prefect_home, LAST_STATE) == [("CANCELLED", "scan: stopped by SIGINT")]
    # Nothing that DVC left locked keeps it from going on.
    change(project, "scan", "cp one scan")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "-s", "scan"], cwd=project, check=True)


def test_wrong_params_are_one_message_before_anything_starts(project: Path, prefect_home: Path) -> None:
    (project / "params.yaml").write_text("batches: {2026-11-23: {role: pretrain, source: x}}")
    flow = start(project, prefect_home)
    output = flow.communicate()[0]
    assert flow.returncode == 1
    assert output.startswith("error: params.yaml: ")
    assert "2026-11-23" in output
    assert not (project / "dvc.lock").exists()


def test_the_tasks_are_the_named_stages(project: Path) -> None:
    assert stage_names(project / "dvc.yaml") == STAGES
