"""`python -m pipelines.retrain` for real, over a project of tiny stages: Prefect, git, DVC and MLflow, no training.

Only validation, training, evaluation and registration are stand-ins; each is a few lines of `tiny.py`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.batch_list import batches
from pipelines.environment import settings
from pipelines.retrain_due import drifted, due, new_images, not_due
from pipelines.retrain_report import Report
from pipelines.worktree import commit_of, git, text_at
from stages.params.retrain import Retrain
from stages.tracking import Version
from tests.closure import ROOT

# ------------------------------------------------------------------------------------------------ without any process


def validation(**images: int) -> dict[str, Any]:
    """reports/validation.json of batches with so many training images; `drifting` drifts."""
    return {
        "batches": {
            name: {"splits": {"train": count, "fresh": 5}, "drift": [{"fact": "width", "drifted": name == "drifting"}]}
            for name, count in images.items()
        }
    }


def test_retraining_is_due_with_enough_images_with_drift_or_with_age() -> None:
    found = validation(a=30, b=20, drifting=1)
    assert new_images(found, ["a", "b"]) == 50
    assert new_images(found, []) == 0
    assert drifted(found, ["a", "drifting"]) == ["drifting"]
    policy = Retrain(min_images=50)
    assert "50 new training images" in due(policy, 50, [], old=False)
    assert due(policy, 49, [], old=False) == ""
    assert "drift in drifting" in due(policy, 1, ["drifting"], old=False)
    assert due(Retrain(min_images=50, on_drift=False), 1, ["drifting"], old=False) == ""
    assert "older than 7 days" in due(policy, 1, [], old=True)
    assert not_due(policy, 1).startswith("retraining is not due yet: 1 new training image, ")


def version(number: int, *aliases: str, **tags: str) -> Version:
    """A version in no registry."""
    return Version("pets", number, "run", "", dict(tags), aliases, "", 0.0)


def test_the_report_says_what_came_of_it_and_what_to_do() -> None:
    facts = {"accepted": 75, "quarantined": 3, "quarantined_by": {"decodes": 3}, "drift": []}
    report = Report("pets", "52 new training images", version(7, gate="passed"), True, "c0ffee" * 6, "retrain", "main")
    report.accepted["d-1"] = facts
    report.left_alone["d-2"] = "incomplete: it holds no _READY"
    report.refused["bad"] = ["too much is quarantined"]
    assert report.worth_telling()
    assert report.line().startswith("pets version 7: gate passed, under review as challenger. refused: bad (too much")
    page = report.page("http://127.0.0.1:5000")
    for text in ("(http://127.0.0.1:5000/#/models/pets/versions/7)", "75 images accepted, 3 quarantined (3 decodes)",
                 "- **d-2**: incomplete", "- **bad**: too much", "`git merge retrain`"):  # fmt: skip
        assert text in page
    assert "make ui" in report.page()


def test_a_report_of_nothing_is_one_line_and_nobody_is_told() -> None:
    report = Report(why="no new delivery in data/incoming")
    assert report.line() == "nothing to do: no new delivery in data/incoming"
    assert not report.worth_telling()


# --------------------------------------------------------------------------------------------- the flow, as a process

TINY = '''
import hashlib, json, shutil, sys
from pathlib import Path
import yaml
from stages import tracking
from stages.data.raw import members, raw_tars

params = yaml.safe_load(Path("params.yaml").read_text())
raw = {name: Path("data/raw", batch["role"], name) for name, batch in params["batches"].items()}

def validate():
    for folder in Path("data/raw").glob("*/*"):
        if folder.name not in raw:
            shutil.rmtree(folder)
    files = {name: [m[0] for tar in raw_tars(folder) for m in members(tar)] for name, folder in raw.items()}
    stops = [f"batch {name}: a bad file" for name, each in files.items() if any("bad" in file for file in each)]
    facts = {name: {"accepted": len(each), "quarantined": 0, "quarantined_by": {}, "splits": {"train": len(each)},
                    "drift": []} for name, each in files.items()}
    out = Path(".synset/validation-failed" if stops else "reports")
    out.mkdir(parents=True, exist_ok=True)
    (out / "validation.json").write_text(json.dumps({"batches": facts, "stops": stops}, indent=1))
    (out / "validation.html").write_text("<html>")
    if stops:
        sys.exit("error: not fit for training: " + "; ".join(stops))

def finetune():
    content = hashlib.sha256(b"".join(t.read_bytes() for f in sorted(raw.values()) for t in raw_tars(f))).hexdigest()
    Path("models/finetuned").mkdir(parents=True)
    Path("models/finetuned/model.safetensors").write_text(content + Path("recipe").read_text())

def evaluate():
    Path("reports/metrics.json").write_text(json.dumps({"images": len(Path("models/finetuned/model.safetensors").read_bytes())}))

def register():
    import os
    sha = hashlib.sha256(Path("models/finetuned/model.safetensors").read_bytes()).hexdigest()
    name = params["register"]["name"]
    assert os.environ["SYNSET_UNFINISHED"] == "retrain"
    client = tracking.open_client()
    if not tracking.find_version(name, sha):
        if not client.search_registered_models():
            client.create_registered_model(name)
        run = client.create_run(client.create_experiment("e") if not client.get_experiment_by_name("e") else client.get_experiment_by_name("e").experiment_id)
        client.log_artifact(run.info.run_id, "params.yaml")
        tags = {"model.sha256": sha, "unfinished": "retrain", "gate": "passed"}
        client.create_model_version(name, run.info.artifact_uri + "/model", run.info.run_id, tags=tags, description="made from commit-to-come")
    Path("models/registered.json").write_text(sha)

globals()[sys.argv[1]]()
'''  # noqa: E501


def graph() -> dict[str, Any]:
    """dvc.yaml of the tiny project."""
    raw = {"role": "${item.role}", "key": "${key}"}
    ingest = {
        "cmd": "python -m stages.ingest ${key}",
        "params": ["batches.${key}.source"],
        "outs": [f"data/raw/{raw['role']}/{raw['key']}"],
    }
    kept = {"cache": False}
    return {
        "ingest": {"foreach": "${batches}", "do": ingest},
        "validate": {
            "cmd": "python tiny.py validate", "params": ["batches"], "deps": ["data/raw"],
            "outs": [{"reports/validation.json": kept}],
        },
        "finetune": {
            "cmd": "python tiny.py finetune", "deps": ["data/raw", "reports/validation.json", "recipe"],
            "outs": ["models/finetuned"],
        },
        "evaluate": {
            "cmd": "python tiny.py evaluate", "deps": ["models/finetuned"], "metrics": [{"reports/metrics.json": kept}],
        },
        "register": {
            "cmd": "python tiny.py register", "deps": ["models/finetuned"], "outs": [{"models/registered.json": kept}],
        },
    }  # fmt: skip


class Project:
    """A checkout with the project's own pipelines and stages, and a graph of tiny ones."""

    def __init__(self, folder: Path, api: str, database: Path) -> None:
        self.root = folder
        for name in ("pipelines", "stages"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in (".dvc/config", ".dvc/.gitignore", ".gitignore", ".dvcignore", "environment.mk", "params.yaml"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": graph()}, sort_keys=False))
        (folder / "tiny.py").write_text(TINY)
        (folder / "recipe").write_text("")
        source = "../first"
        text = (folder / "params.yaml").read_text()
        for sample in ("sample:upstream?seed=1", "sample:target?seed=1"):
            text = text.replace(sample, source)
        (folder / "params.yaml").write_text(text)
        self.incoming = folder / "data/incoming"
        self.incoming.mkdir(parents=True)
        put(folder / "data/first", 3)
        shutil.copyfile(database, folder / "mlflow.db")
        own = {"PREFECT_API_URL": api, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "GIT_"))}
        self.environment = kept | settings(folder) | own
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for command in (["init", "-qb", "main"], ["config", "user.name", "a"], ["config", "user.email", "a@b"]):
            self.git(*command)
        self.commit("begin")

    def git(self, *arguments: str) -> str:
        """git in the checkout, which must succeed."""
        done = subprocess.run(["git", *arguments], cwd=self.root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit(self, message: str) -> None:
        """Everything, on the branch checked out."""
        self.git("add", "-A")
        self.git("commit", "-qm", message)

    def deliver(self, name: str, count: int = 2, bad: bool = False, ready: bool = True) -> Path:
        """A delivery of `count` files."""
        put(self.incoming / name, count, "bad" if bad else "good")
        if ready:
            (self.incoming / name / "_READY").touch()
        return self.incoming / name

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """The flow, leader of a process group."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.retrain", *arguments], cwd=self.root, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, code: int = 0) -> str:
        """The flow; its output."""
        flow = self.start(*arguments)
        output = flow.communicate(timeout=600)[0]
        assert flow.returncode == code, output
        return output

    def kill_in(self, phase: str, *arguments: str) -> None:
        """Starts the flow, and kills it as soon as it says that it begins `phase`."""
        flow = self.start(*arguments)
        assert flow.stdout
        seen = []
        for line in flow.stdout:
            seen.append(line)
            if line.rstrip().endswith(f"phase: {phase}"):
                os.kill(flow.pid, signal.SIGKILL)
                flow.wait()
                return
        raise AssertionError("".join(seen))

    def registry(self) -> list[dict[str, Any]]:
        """All versions, newest first."""
        code = (
            "import json; from stages import tracking; print(json.dumps([[v.number, v.aliases, v.tags, v.description, v.sha256]"
            " for v in tracking.versions('synset-sample')]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.root, env=self.environment, check=True, capture_output=True, text=True
        )
        keys = ("number", "aliases", "tags", "description", "sha256")
        return [dict(zip(keys, each, strict=True)) for each in json.loads(done.stdout)]

    def alias(self, number: int, name: str) -> None:
        """Sets an alias, as a person would."""
        code = f"from stages import tracking as t; t.set_alias([v for v in t.versions('synset-sample') if v.number == {number}][0], {name!r})"
        subprocess.run([sys.executable, "-c", code], cwd=self.root, env=self.environment, check=True)

    def tip(self) -> str:
        """The commit of the branch; empty where there is none."""
        return commit_of(self.root, "refs/heads/retrain")

    def batches(self) -> list[str]:
        """Those of the branch."""
        return list(batches(text_at(self.root, self.tip(), "params.yaml")))

    def finished(self) -> None:
        """What must hold after every run that ended well."""
        for each in self.registry():
            assert "unfinished" not in each["tags"]
            assert "commit-to-come" not in each["description"]
        assert not git(self.root, "status", "--porcelain")
        assert git(self.root, "branch", "--show-current") == "main"
        assert not list((self.root / ".synset/retrain").glob("under*"))


def put(folder: Path, count: int, what: str = "good") -> None:
    """So many files of a class."""
    (folder / "cat").mkdir(parents=True)
    for number in range(count):
        (folder / "cat" / f"{what}{number}").write_text(f"{folder.name} {number}")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server of this module's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=kept | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry: making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    code = "from stages import tracking; tracking.versions('x')"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{path}"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    return path


@pytest.fixture
def project(tmp_path: Path, api: str, database: Path) -> Project:
    """A fresh one."""
    (tmp_path / "checkout").mkdir()
    return Project(tmp_path / "checkout", api, database)
