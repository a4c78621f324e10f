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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs  # type: ignore[import-untyped]
import yaml

from bench.versioning import s3_server
from pipelines.environment import settings
from pipelines.processes.stage_process import Stop
from pipelines.retrain import flow, steps, versions
from pipelines.retrain.batch_list import batches
from pipelines.retrain.deliveries import remembered
from pipelines.retrain.due import drifted, due, new_images, not_due
from pipelines.retrain.report import Report
from pipelines.retrain.worktree import commit_of, text_at
from stages.params.retrain import Retrain
from stages.registry.versions import Version
from stages.runtime.git import git
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
    for text in ("(http://127.0.0.1:5000/#/models/pets/versions/7)", "(http://127.0.0.1:5000/#/runs/run)",
                 "75 images accepted, 3 quarantined (3 decodes)",
                 "- **d-2**: incomplete", "- **bad**: too much", "`git merge retrain`"):  # fmt: skip
        assert text in page
    assert "make ui" in report.page()


def test_the_report_of_a_batch_taken_back_says_so_whatever_the_model() -> None:
    report = Report("pets", "d-1 was taken back", version(1, gate="passed"), taken_back="d-1")
    assert report.line() == "d-1 was taken back: the model made is pets version 1: gate passed, registered before"


def test_what_was_trained_on_a_batch_taken_back_is_tagged_and_under_review_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    both = [version(2, "challenger", retracted="d-0"), version(1, "serving")]
    monkeypatch.setattr(versions, "_batches", lambda each: ["d-1"] if each.number == 2 else ["target"])
    monkeypatch.setattr(versions.versions, "list_versions", lambda name: both)
    monkeypatch.setattr(versions.versions, "set_tags", lambda each, tags: told.append((each.number, tags)))
    monkeypatch.setattr(versions.versions, "delete_alias", lambda *which: told.append(which))
    assert versions.mark_retracted("pets", "d-1") == both[:1]
    assert told == [(2, {"retracted": "d-0, d-1"}), ("pets", "challenger")]


def test_a_reason_without_a_batch_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["retrain", "--reason", "takedown request"])
    with pytest.raises(SystemExit):
        flow.main()
    assert "name it by --retract" in capsys.readouterr().err


def test_a_delivery_may_be_called_as_an_option_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNSET_INCOMING", str(tmp_path))
    put(tmp_path / "--raw", 1)
    work = steps.Work(Retrain(), remembered(tmp_path / "memory.json"), Report(), Stop())
    assert len(steps.content_digest(work, "--raw")) == 64


def test_a_version_whose_run_is_gone_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.artifacts, "download", lambda *_: None)
    (tmp_path / "params.yaml").write_text("batches:\n  d-1: {role: finetune}\n")
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b.org", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    found = version(2, **{"git.commit": git(tmp_path, "rev-parse", "HEAD")})
    assert versions._batches(found, tmp_path) == ["d-1"]
    assert versions._batches(version(3, **{"git.commit": "0" * 40}), tmp_path) == []
    assert versions._batches(version(4), tmp_path) == []


def test_a_report_of_nothing_is_one_line_and_nobody_is_told() -> None:
    report = Report(why="no new delivery in data/incoming")
    assert report.line() == "nothing to do: no new delivery in data/incoming"
    assert not report.worth_telling()


# --------------------------------------------------------------------------------------------- the flow, as a process

TINY = """
import hashlib, json, shutil, sys
from pathlib import Path
import yaml
from stages.registry import versions
from stages.registry.client import open_client
from stages.data.raw.tars import members, raw_tars

params = yaml.safe_load(Path("params.yaml").read_text())
raw = {name: Path("data/raw", batch["role"], name) for name, batch in params["batches"].items()}

def validate():
    for folder in Path("data/raw").glob("*/*"):
        if folder.name not in raw:
            shutil.rmtree(folder)
    files = {name: [m.name for tar in raw_tars(folder) for m in members(tar, folder)] for name, folder in raw.items()}
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
    client = open_client()
    if not versions.find_version(name, sha):
        if not client.search_registered_models():
            client.create_registered_model(name)
        run = client.create_run(client.create_experiment("e") if not client.get_experiment_by_name("e") else client.get_experiment_by_name("e").experiment_id)
        client.log_artifact(run.info.run_id, "params.yaml")
        tags = {"model.sha256": sha, "unfinished": "retrain", "gate": "passed"}
        client.create_model_version(name, run.info.artifact_uri + "/model", run.info.run_id, tags=tags, description="made from commit-to-come")
    Path("models/registered.json").write_text(sha)

globals()[sys.argv[1]]()
"""  # noqa: E501


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
        (folder / "data/first/dog").mkdir()
        (folder / "data/first/dog/good0").write_text("the second class")
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
            "import json; from stages.registry.versions import list_versions\n"
            "rows = [[v.number, v.aliases, v.tags, v.description, v.sha256] for v in list_versions('synset-sample')]\n"
            "print(json.dumps(rows))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        )
        keys = ("number", "aliases", "tags", "description", "sha256")
        return [dict(zip(keys, each, strict=True)) for each in json.loads(done.stdout)]

    def alias(self, number: int, name: str) -> None:
        """Sets an alias, as a person would."""
        chosen = f"[each for each in t.list_versions('synset-sample') if each.number == {number}][0]"
        code = f"from stages.registry import versions as t; t.set_alias({chosen}, {name!r})"
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
    code = "from stages.registry import versions; versions.list_versions('x')"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{path}"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    return path


@pytest.fixture
def project(tmp_path: Path, api: str, database: Path) -> Project:
    """A fresh one."""
    (tmp_path / "checkout").mkdir()
    return Project(tmp_path / "checkout", api, database)


@pytest.mark.slow
def test_deliveries_good_and_bad(project: Project) -> None:
    output = project.run()
    assert "nothing to do: no new delivery in data/incoming" in output
    assert "phase: prepare" not in output
    assert project.tip() == ""

    project.incoming.rmdir()
    assert "no new delivery in data/incoming, which is no folder" in project.run()

    project.deliver("2026-11-20")
    project.deliver("2026-11-21", bad=True)
    project.deliver("2026-11-22", ready=False)
    project.deliver("Odd Name")
    (project.incoming / "empty").mkdir()
    (project.incoming / "empty/_READY").touch()
    main = project.git("rev-parse", "main")
    output = project.run()
    assert "synset-sample version 1: gate passed, under review as challenger" in output
    for said in (
        "refused: 2026-11-21 (batch d-2026-11-21: a bad file)",
        "2026-11-22 (incomplete",
        "Odd Name (its name",
        "refused: empty",
    ):
        assert said in output
    assert project.batches() == ["upstream", "target", "d-2026-11-20"]
    assert project.git("rev-parse", "main") == main
    only = project.registry()[0]
    assert only["tags"]["git.commit"] == project.tip()
    assert only["aliases"] == ["challenger"]
    assert only["description"] == f"made from {project.tip()}"
    assert "d-2026-11-21" not in text_at(project.root, project.tip(), "dvc.lock")
    assert (project.root / ".synset/retrain/refused/d-2026-11-21.html").exists()
    project.finished()

    tip = project.tip()
    (project.incoming / "2026-11-20/cat/good0").write_text("changed")
    output = project.run()
    assert "nothing to do" in output
    for said in (
        "2026-11-20 (changed after it was accepted",
        "2026-11-21 (refused before: batch d-2026-11-21: a bad file)",
        "empty (refused before: ",
    ):
        assert said in output
    assert "phase: prepare" not in output
    assert project.tip() == tip

    (project.incoming / "2026-11-22/_READY").touch()
    (project.root / "params.yaml").write_text(
        (project.root / "params.yaml").read_text().replace("alpha: 0.05", "alpha: 0.01")
    )
    project.commit("another alpha")
    assert "version 2" in project.run()
    assert project.batches() == ["upstream", "target", "d-2026-11-20", "d-2026-11-22"]
    assert "alpha: 0.01" in text_at(project.root, project.tip(), "params.yaml")
    project.finished()


@pytest.mark.slow
def test_a_delivery_in_s3_is_retrained_on(project: Project) -> None:
    text = (project.root / "params.yaml").read_text().replace("../first", str(project.root / "data/first"))
    (project.root / "params.yaml").write_text(text)
    project.commit("sources of this machine")
    with s3_server() as (endpoint, credentials):
        own = {"AWS_ENDPOINT_URL": endpoint, "SYNSET_INCOMING": "s3://team/incoming"}
        project.environment |= {**credentials, **own}
        assert "nothing to do: no new delivery in s3://team/incoming" in project.run()
        store = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)
        store.put(f"{project.deliver('2026-11-23')}/", "team/incoming/2026-11-23/", recursive=True)
        assert "under review as challenger" in project.run()
        assert project.batches()[-1] == "d-2026-11-23"
        assert "nothing to do: no new delivery in s3://team/incoming" in project.run()
    output = project.run(code=1)  # its server is gone
    assert "s3://team/incoming cannot be reached" in output and "nothing to do" not in output
    project.finished()


@pytest.mark.slow
def test_a_delivery_that_was_mended_is_read_again(project: Project) -> None:
    folder = project.deliver("2026-11-20", bad=True)
    assert "refused: 2026-11-20 (batch d-2026-11-20: a bad file)" in project.run()
    assert (project.root / ".synset/retrain/refused/d-2026-11-20.html").exists()
    shutil.rmtree(folder)
    project.deliver("2026-11-20")
    assert "version 1" in project.run()
    assert project.batches() == ["upstream", "target", "d-2026-11-20"]
    project.finished()


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase", ["prepare", "ingest", "finetune", "register", "commit", "tag", "alias", "branch", "report"]
)
def test_a_run_killed_in_any_phase_leaves_what_was_or_what_will_be(project: Project, phase: str) -> None:
    project.deliver("2026-11-20")
    project.kill_in(phase)
    assert project.tip() == "" or phase in ("branch", "report")
    assert not git(project.root, "status", "--porcelain")
    output = project.run()
    assert "synset-sample version 1: gate passed, under review as challenger" in output
    assert project.batches() == ["upstream", "target", "d-2026-11-20"]
    found = project.registry()
    assert [each["number"] for each in found] == [1]
    assert found[0]["aliases"] == ["challenger"]
    assert found[0]["tags"]["git.commit"] == project.tip()
    project.finished()


@pytest.mark.slow
def test_what_was_killed_is_removed_where_it_is_wanted_no_more(project: Project) -> None:
    folder = project.deliver("2026-11-20")
    project.kill_in("commit")
    assert project.registry()[0]["tags"]["unfinished"] == "retrain"
    shutil.rmtree(folder)
    assert "nothing to do" in project.run()
    assert project.registry() == []
    assert project.tip() == ""
    project.finished()


@pytest.mark.slow
def test_of_two_triggers_one_retrains_and_one_reports(project: Project) -> None:
    project.deliver("2026-11-20")
    (project.root / "tiny.py").write_text(
        TINY.replace("def evaluate():", "def evaluate():\n    import time; time.sleep(30)")
    )
    project.commit("slow")
    first = project.start()
    assert first.stdout
    for line in first.stdout:
        if "phase: evaluate" in line:
            break
    assert "another retrain is at work" in project.run()
    assert "version 1" in first.communicate(timeout=300)[0]
    assert len(project.registry()) == 1


@pytest.mark.slow
def test_a_failure_leaves_everything_as_it_was_and_the_next_run_goes_on(project: Project) -> None:
    (project.root / "recipe").unlink()
    project.commit("no recipe")
    project.deliver("2026-11-20")
    output = project.run(code=1)
    assert "the next run goes on from there" in output
    assert "Traceback" not in output
    assert project.registry() == []
    assert project.tip() == ""
    (project.root / "recipe").write_text("again")
    project.commit("the recipe")
    assert "version 1" in project.run()
    project.finished()


@pytest.mark.slow
def test_few_images_wait_and_are_not_looked_at_again(project: Project) -> None:
    text = (project.root / "params.yaml").read_text()
    (project.root / "params.yaml").write_text(text.replace("min_images: 1", "min_images: 5"))
    (project.root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    project.commit("five, and trained today")
    project.deliver("2026-11-20")
    assert "not due yet: 2 new training images" in project.run()
    output = project.run()
    assert "2026-11-20 (waits until retraining is due)" in output
    assert "phase: prepare" not in output
    project.deliver("2026-11-21", count=3)
    assert "version 1" in project.run()
    assert project.batches()[2:] == ["d-2026-11-20", "d-2026-11-21"]


@pytest.mark.slow
def test_a_batch_is_taken_back(project: Project) -> None:
    for name in ("2026-11-20", "2026-11-21"):
        project.deliver(name)
        project.run()
    project.alias(2, "serving")
    output = project.run("--retract", "d-2026-11-20", "--reason", "a takedown")
    assert "version 3" in output
    assert "version 2 is in force and was trained on d-2026-11-20" in output
    assert project.batches() == ["upstream", "target", "d-2026-11-21"]
    marked = {each["number"]: each["tags"].get("retracted") for each in project.registry()}
    assert marked == {1: "d-2026-11-20", 2: "d-2026-11-20", 3: None}
    assert "a takedown" in project.git("log", "-1", "--format=%B", "retrain")
    assert "2026-11-20 (its batch d-2026-11-20 was taken back)" in project.run()
    assert "there is no batch d-9" in project.run("--retract", "d-9", code=1)
    assert "error: main:params.yaml: `pretrain.method`" in project.run("--retract", "upstream", code=1)
    project.finished()
    (project.root / "recipe").unlink()
    project.commit("no recipe")
    output = project.run("--retract", "d-2026-11-21", code=1)
    assert "d-2026-11-21 was not taken back; put that right and ask again" in output
    assert not (project.root / ".synset/retrain/retract.json").exists()


@pytest.mark.slow
def test_taking_back_goes_on_after_a_kill(project: Project) -> None:
    for name in ("2026-11-20", "2026-11-21"):
        project.deliver(name)
    project.run()
    project.kill_in("finetune", "--retract", "d-2026-11-20")
    assert "d-2026-11-20" in project.batches()
    stopped = project.start()
    assert stopped.stdout
    said = []
    for line in stopped.stdout:
        said.append(line)
        if line.rstrip().endswith("phase: finetune"):
            stopped.terminate()
    assert stopped.wait() == 130
    assert "to withdraw the request, delete .synset/retrain/retract.json" in "".join(said)
    project.kill_in("branch")
    project.run()
    assert project.batches() == ["upstream", "target", "d-2026-11-21"]
    assert [each["tags"].get("retracted") for each in project.registry()] == [None, "d-2026-11-20"]
    project.finished()


@pytest.mark.slow
def test_what_the_remote_lacks_is_pushed_by_the_next_run(project: Project) -> None:
    store = project.root.parent / "store"
    with (project.root / ".dvc/config").open("a") as file:
        file.write("['remote \"store\"']\n    url = ../../store\n")
    text = (project.root / ".dvc/config").read_text().replace("[core]\n", "[core]\n    remote = store\n")
    (project.root / ".dvc/config").write_text(text)
    project.commit("a remote")
    store.write_text("no folder")
    project.deliver("2026-11-20")
    output = project.run()
    assert "version 1" in output
    assert "`dvc push` failed" in output
    store.unlink()
    assert "phase: push" in project.run()
    assert list(store.rglob("*.dir"))
    assert "phase: push" not in project.run()
