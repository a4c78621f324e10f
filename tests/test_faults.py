"""Retraining under faults: wherever it is killed, the registry and the branch are as before or as after it.

Kills come at each named phase of the flow, inside each stage's renames, and between commit, tag, alias and branch. The
log (`pytest -s`) lists them. Most runs are the recovery from the kill before, and are killed a step further on.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_retraining import NAME, Program, commit, deliver, git, running
from tests.workspace import ROOT, Workspace

pytestmark = pytest.mark.slow
FAULTS = str(ROOT / "tests/faults")


@dataclass(frozen=True)
class Kill:
    """At the beginning of a phase, or inside a rename or a call of a program."""

    phase: str = ""
    program: str = ""
    event: str = "os.rename"
    text: str = ""
    count: int = 1
    fault: str = "kill"

    def __str__(self) -> str:
        return f"phase {self.phase}" if self.phase else f"{self.fault} in {self.program}: {self.event} of {self.text}"


def inside(program: str, text: str, event: str = "os.rename", count: int = 1, fault: str = "kill") -> Kill:
    """A kill right before something is done."""
    return Kill("", program, event, text, count, fault)


BEFORE_THE_VERSION = [
    Kill("find"),
    Kill("prepare"),
    inside("pipelines.retrain", "worktree", "subprocess.Popen"),
    inside("pipelines.retrain", "params.yaml"),
    Kill("ingest"),
    inside("stages.ingest", "data/raw"),
    Kill("scan"),
    inside("stages.scan", "data/facts"),
    Kill("validate"),
    inside("stages.validate", "reports/validation.json"),
    inside("stages.validate", "data/accepted"),
    Kill("decide"),
    Kill("shard"),
    inside("stages.shard", "data/shards", fault="full"),
    inside("stages.shard", "data/shards"),
    inside("dvc", "dvc.lock", "open", 2),
    Kill("pretrain"),
    Kill("finetune"),
    inside("stages.finetune", ".synset/work"),
    inside("stages.finetune", "models/finetuned", fault="full"),
    inside("stages.finetune", "models/finetuned"),
    Kill("evaluate"),
    inside("stages.evaluate", "reports/metrics.json"),
    Kill("register"),
]
FROM_THE_VERSION_ON = [
    inside("stages.register", "registered.json"),
    Kill("commit"),
    inside("pipelines.retrain", "'commit'", "subprocess.Popen"),
    Kill("tag"),
    Kill("alias"),
    Kill("branch"),
    inside("pipelines.retrain", "update-ref", "subprocess.Popen"),
    Kill("push"),
    Kill("report"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server, so that no run has to start one."""
    home = tmp_path_factory.mktemp("prefect")
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", "4290"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    yield "http://127.0.0.1:4290/api"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, server: str) -> Workspace:
    """A checkout with a DVC remote, a first version and a delivery that waits."""
    workspace = Workspace(tmp_path_factory.mktemp("faults"), PREFECT_API_URL=server)
    git(workspace, "branch", "-M", "main")
    added = workspace.run("dvc", "remote", "add", "--default", "store", str(tmp_path_factory.mktemp("remote")))
    assert added.returncode == 0, added.stdout
    workspace.repro()
    commit(workspace, "the first model")
    deliver(workspace, "2026-11-23", seed=6)
    return workspace


def retrain(workspace: Workspace, kill: Kill | None = None) -> Program:
    """`python -m pipelines.retrain` to its end, killed on the way."""
    fault = f"{kill.fault} {kill.program} {kill.event} {kill.text} {kill.count}" if kill and kill.program else ""
    environment = {"PYTHONPATH": FAULTS, "SYNSET_FAULT": fault} if fault else {}
    before = dict(workspace.environment)
    workspace.environment.update(environment)
    try:
        with running(workspace, sys.executable, "-m", "pipelines.retrain") as program:
            if kill and kill.phase:
                kill_at(program, kill.phase)
            program.process.wait()
    finally:
        workspace.environment.clear()
        workspace.environment.update(before)
    return program


def kill_at(program: Program, phase: str) -> None:
    """Kills the flow alone, and no process that it has started, when it comes to a phase."""
    seen = threading.Event()
    while not seen.wait(0.01) and program.process.poll() is None:
        if any(re.search(rf"phase: {phase}\b", line) for line in program.lines):
            program.process.send_signal(signal.SIGKILL)
            return


def state(workspace: Workspace) -> dict[str, object]:
    """What a person sees: the branch, the finished versions, the alias, their own checkout."""
    script = (
        "import json; from stages.registry import versions\n"
        f"found = [each for each in versions.list_versions('{NAME}') if not each.unfinished]\n"
        f"challenger = versions.version_by_alias('{NAME}', 'challenger')\n"
        "print(json.dumps([[each.sha256, each.commit] for each in found] + [challenger.number]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=workspace.root, env=workspace.environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    *versions, challenger = json.loads(done.stdout)
    return {
        "branch": workspace.run("git", "rev-parse", "--verify", "-q", "retrain").stdout.strip(),
        "versions": versions,
        "challenger": challenger,
        "checkout": git(workspace, "rev-parse", "HEAD") + git(workspace, "status", "--porcelain"),
    }


def is_after(found: dict[str, object], before: dict[str, object]) -> bool:
    """One more version, challenger, whose commit is the branch; the checkout untouched."""
    versions = found["versions"]
    assert isinstance(versions, list)
    assert isinstance(before["versions"], list)
    return (
        len(versions) == len(before["versions"]) + 1
        and versions[0][1] == found["branch"]
        and found["challenger"] == len(versions)
        and found["checkout"] == before["checkout"]
    )


def test_killed_anywhere_it_ends_before_or_after(workspace: Workspace, tmp_path: Path) -> None:
    before = state(workspace)
    for number, kill in enumerate(BEFORE_THE_VERSION, start=1):
        program = retrain(workspace, kill)
        assert program.process.returncode != 0, f"{kill} did not come\n" + "\n".join(program.lines)
        assert state(workspace) == before, str(kill)
        print(f"{number:>2}  {kill}: as before", flush=True)
    for number, kill in enumerate(FROM_THE_VERSION_ON, start=len(BEFORE_THE_VERSION) + 1):
        program = retrain(workspace, kill)
        assert program.process.returncode != 0, f"{kill} did not come\n" + "\n".join(program.lines)
        assert before["checkout"] == state(workspace)["checkout"], str(kill)
        print(
            f"{number:>2}  {kill}: {'as after' if is_after(state(workspace), before) else 'to be finished'}", flush=True
        )
    program = retrain(workspace)
    assert program.process.returncode == 0, "\n".join(program.lines)
    after = state(workspace)
    assert is_after(after, before)

    undisturbed = Workspace(tmp_path)
    git(undisturbed, "branch", "-M", "main")
    deliver(undisturbed, "2026-11-23", seed=6)
    (undisturbed.root / "params.yaml").write_text(git(workspace, "show", "retrain:params.yaml"))
    undisturbed.repro()
    model = undisturbed.run("sha256sum", "models/finetuned/model.safetensors").stdout.split()[0]
    assert isinstance(after["versions"], list)
    assert after["versions"][0][0] == model
