"""`make schedule` for real: whatever is killed runs again, and nothing is left after Ctrl-C."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.environment import settings
from pipelines.processes.servers import answers
from tests.prefect_api import python

ROOT = Path(__file__).resolve().parents[2]


def test_wrong_params_are_said_before_anything_is_started(tmp_path: Path) -> None:
    wrong = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    wrong.write_text(re.sub(r"interval: \d+", "interval: 1", text, count=1))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.schedule"], cwd=ROOT, env={**os.environ, "SYNSET_PARAMS": str(wrong)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*`reconcile\.interval`: .*\n", done.stderr)


# ------------------------------------------------------------------------------------------------------ real servers

# As short as the flows can be that still do what matters here: take the lock, run a stage, look at a stop.
STAND_IN = '''
"""A stand-in."""
import sys
from pipelines import environment
environment.apply()
from prefect import flow, get_run_logger, runtime
from prefect.states import Cancelled, Completed
from pipelines.processes.flow_lock import exclusive, clear_after_kill
from pipelines.processes.stage_process import Stop, run_streamed, signals_to

@flow(name="NAME", persist_result=False)
def NAME(seconds: int = 0):
    clear_after_kill("retrain") if "NAME" != "retrain" else None
    stop = Stop()
    with signals_to(stop), exclusive("NAME", str(runtime.flow_run.id)):
        command = [sys.executable, "-c", f"import time; print('a stage works', flush=True); time.sleep({seconds})"]
        run_streamed(command, get_run_logger().info, stop)
    return Cancelled(message=stop.reason) if stop.reason else Completed(message="done")
'''
RUN = """
import sys
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    deployment = client.read_deployment_by_name("retrain/schedule")
    print(client.create_flow_run_from_deployment(deployment.id, parameters={"seconds": int(sys.argv[1])}).id)
"""
STATE = """
import sys
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(client.read_flow_run(sys.argv[1]).state.name)
"""


class Schedule:
    """`python -m pipelines.schedule` in a checkout of its own, with stand-ins for the flows."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("stages", "pipelines"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "environment.mk", root)
        for name, path in {"retrain": "retrain/flow", "reconcile": "reconcile", "verify": "verify"}.items():
            (root / f"pipelines/{path}.py").write_text(STAND_IN.replace("NAME", name))
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params["reconcile"]["interval"] = 15
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        self.environment = {**os.environ, **settings(root)}
        for name in ("PYTHONPATH", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
            self.environment.pop(name, None)
        self.log = root / "log"
        self.process = self.start(self.log)

    def start(self, log: Path) -> "subprocess.Popen[bytes]":
        """The command itself."""
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "pipelines.schedule"], cwd=self.root, env=self.environment,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Waits until the log has it as often as this; the last of them."""
        for _ in range(1800):
            found = list(re.finditer(pattern, self.log.read_text()))
            if len(found) >= times:
                return found[-1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise AssertionError(f"{pattern} is not in\n{self.log.read_text()}")

    def api(self) -> dict[str, str]:
        """The environment in which programs use its Prefect."""
        address = self.wait_for(r"Prefect at (\S+),")[1]
        return {**self.environment, "PREFECT_API_URL": f"{address}/api"}

    def retrain(self, seconds: int) -> str:
        """Has the flow started, as by its button in Prefect's UI."""
        return python(RUN, self.api(), str(seconds)).strip()

    def wait_for_state(self, run: str, *names: str) -> str:
        """Waits until the run is in one of these states."""
        state = ""
        for _ in range(180):
            if (state := python(STATE, self.api(), run).strip()) in names:
                return state
            time.sleep(1)
        raise AssertionError(f"{run} is {state}, not {names}\n{self.log.read_text()}")

    def processes(self) -> list[psutil.Process]:
        """All that it has started, however indirectly."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PREFECT_HOME") == self.environment["PREFECT_HOME"]:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, *arguments: str) -> None:
        """kill -9 of the one process that has these words in its command."""
        (process,) = [each for each in self.processes() if set(arguments) <= set(each.cmdline())]
        process.kill()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Schedule]:
    """Ended with all it started, whatever happened."""
    started = Schedule(tmp_path)
    yield started
    for process in started.processes():
        process.kill()
    started.process.wait()


@pytest.mark.slow
def test_whatever_is_killed_the_next_run_runs_and_ctrl_c_leaves_nothing(running: Schedule, tmp_path: Path) -> None:
    running.wait_for("flows are started when they are due")
    running.wait_for(r"for flow 'reconcile'(.|\n)*Completed\('done'\)")  # by its schedule

    second = running.start(tmp_path / "second")
    assert second.wait() == 1
    assert (tmp_path / "second").read_text().startswith("error: another schedule is at work in this checkout (process ")

    killed = running.retrain(300)
    running.wait_for("a stage works", times=len(re.findall("a stage works", running.log.read_text())) + 1)
    running.wait_for_state(killed, "Running")
    late = running.retrain(0)
    assert running.wait_for_state(late, "Cancelled", "Completed") == "Cancelled"  # one at a time

    flow = next(each for each in running.processes() if "prefect.engine" in each.cmdline())
    flow.kill()
    assert running.wait_for_state(killed, "Crashed", "Completed") == "Crashed"
    running.wait_for_state(running.retrain(0), "Completed")

    killed = running.retrain(300)
    running.wait_for_state(killed, "Running")
    running.kill("pipelines.schedule", "--flows")
    running.wait_for("flows are started when they are due", times=2)
    running.wait_for_state(killed, "Crashed", "Cancelled")  # it is stopped, and may get as far as saying so
    running.wait_for_state(running.retrain(0), "Completed")

    unharmed = running.retrain(60)
    running.wait_for_state(unharmed, "Running")
    running.kill("prefect", "server")
    running.kill("mlflow", "server")
    running.wait_for("prefect ended with exit code -9; starting it again")
    running.wait_for("mlflow ended with exit code -9; starting it again")
    while not answers(running.api()["PREFECT_API_URL"] + "/health"):
        time.sleep(1)
    assert running.wait_for_state(unharmed, "Completed", "Crashed", "Cancelled") == "Completed"

    cut_off = running.retrain(300)
    running.wait_for_state(cut_off, "Running")
    os.kill(running.process.pid, signal.SIGINT)
    assert running.process.wait() == 0
    assert running.processes() == []
    assert "All deployments have been paused" in running.log.read_text()
