"""Deriving a version again: which one can be, with which packages, and what counts as a difference."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pipelines.maintenance import derivation
from pipelines.maintenance.derivation import choose, different_figures
from pipelines.processes.flow_run import last_error
from pipelines.processes.stage_process import Stop, run_streamed
from pipelines.retrain.worktree import open_tree, record
from stages.registry import logged_models, versions
from stages.registry.client import open_client
from stages.registry.versions import Version
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import sha256
from stages.runtime.git import git

NAME = "synset-sample"


def test_figures_that_are_not_the_same_are_named() -> None:
    before = {"test": {"top1": 0.9, "top5": None}, "fresh": {}, "gone": 1}
    assert different_figures(before, before) == []
    now = {"test": {"top1": 0.9000001, "top5": None}, "fresh": {"d-1": {"top1": None}}}
    assert different_figures(before, now) == ["fresh.d-1.top1", "gone", "test.top1"]


@pytest.mark.parametrize(
    ("made", "machine", "installed", "result", "detail"),
    [
        ("as registered", "cpu A float32", [], "reproduced", "the same weights and figures"),
        ("as registered", "cpu B float32", ["torch==2.14.0"], "reproduced", "the same weights and figures"),
        ("others", "cpu A float32", [], "differs", "on the same kind of machine"),
        ("others", "cpu B float32", [], "not comparable", "it was trained on cpu A float32, this is cpu B float32"),
        ("others", "cpu A float32", ["torch==2.14.0"], "not comparable", "other versions than torch==2.14.0"),
        ("other figures", "cpu A float32", [], "differs", "figures test.top1"),
    ],
)
def test_what_differs_counts_only_where_machine_and_packages_are_the_same(
    tmp_path: Path, made: str, machine: str, installed: list[str], result: str, detail: str
) -> None:
    (tmp_path / "models/finetuned").mkdir(parents=True)
    (tmp_path / "reports").mkdir()
    weights = tmp_path / derivation.WEIGHTS
    weights.write_text("as registered")
    registered = sha256(weights)
    if made == "others":
        weights.write_text(made)
    (tmp_path / layout.METRICS).write_text(json.dumps({"test": {"top1": 0.8 if made == "other figures" else 0.9}}))
    (tmp_path / "recorded.json").write_text(json.dumps({"test": {"top1": 0.9}}))
    tags = {"model.sha256": registered, "machine": "cpu A float32", "git.commit": "0" * 40}
    version = Version("bells", 7, "", "", tags, (), "", 0)
    recorded = {layout.METRICS.as_posix(): tmp_path / "recorded.json"}
    found = derivation._compared(version, tmp_path, recorded, lambda: ["a line", json.dumps([machine, installed])])
    assert found.result == result
    assert detail in found.detail


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], None]) -> Iterator[str]:
    """Five versions: a sound one, and four that no commit gives again; yields the commit of the first."""
    root = tmp_path_factory.mktemp("registry")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=root, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], cwd=root, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True)
    here = {"git.commit": commit.stdout.strip()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        new_database(root)
        client = open_client()
        experiment = client.create_experiment("synset/finetune")
        wrong = [{}, {"git.dirty": "true"}, {"git.commit": ""}, {"unfinished": "retrain"}, {"git.commit": "0" * 40}]
        for number, tags in enumerate(wrong, start=1):
            run = client.create_run(experiment)
            model = client.create_logged_model(experiment, "model", source_run_id=run.info.run_id)
            source = f"models:/{model.model_id}"
            version = versions.create_version(NAME, "About", source, run.info.run_id, here | tags, "Card")
            versions.finish_version(version, f"sha-{number}")
        yield here["git.commit"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (2, "it was made with uncommitted changes .git.dirty., so its commit [0-9a-f]{12} does not give it again"),
        (3, "it names no commit"),
        (4, "retraining has not committed it yet"),
        (5, "this clone has no commit 0000"),
        (6, r"has no version 6 .it has: 5, 4, 3, 2, 1."),
        (0, r"has no version 0 .it has: 5, 4, 3, 2, 1."),
    ],
)
def test_a_version_that_no_commit_gives_again_is_refused(registry: str, number: int, reason: str) -> None:
    with pytest.raises(StageError, match=reason):
        choose(NAME, number, Path.cwd())


def test_without_a_number_it_is_the_one_in_force_else_the_newest(registry: str) -> None:
    with pytest.raises(StageError, match="version 5"):
        choose(NAME, None, Path.cwd())
    versions.set_alias(choose(NAME, 1, Path.cwd()), "serving")
    assert choose(NAME, None, Path.cwd()).commit == registry
    with pytest.raises(StageError, match=r"nothing-of-this-name has no version .it has: none."):
        choose("nothing-of-this-name", None, Path.cwd())


@pytest.fixture
def stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_database: Callable[[Path], None]
) -> tuple[Version, Path]:
    """A version without recorded images, of a model that loads nowhere, and its weights in the registry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    new_database(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    client = open_client()
    run = client.create_run(client.create_experiment("synset/finetune"))
    source = logged_models.log_model(
        run, Path(__file__).parents[1] / "tiny_model.py", Path("model"), {"name": "string"}, [], {}
    )
    created = versions.create_version(NAME, "About", source, run.info.run_id, {"git.commit": "0" * 40}, "Card")
    versions.finish_version(created, sha256(tmp_path / "model/model.safetensors"))
    (weights,) = (tmp_path / "mlartifacts").rglob("model.safetensors")
    return versions.list_versions(NAME)[0], weights


def nothing(*_: object, **__: object) -> list[str]:
    """A command that must not be run."""
    raise AssertionError("a process was started")


class DerivedError(Exception):
    """The derivation began."""


def test_only_other_weights_in_the_registry_are_a_difference(
    stored: tuple[Version, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: object) -> None:
        raise DerivedError

    version, weights = stored
    monkeypatch.setattr(derivation, "folder", lambda name: Path("synset", name))
    monkeypatch.setattr(derivation, "open_tree", begin)
    with pytest.raises(DerivedError):  # no recorded images, and a model that does not load, are none
        derivation.derive(version, nothing)
    weights.write_bytes(b"Weights")
    found = derivation.derive(version, nothing)
    assert found.result == "differs"
    assert f"its weights have sha256 {sha256(weights)}, by its tag {version.sha256}" in found.detail


def test_weights_that_cannot_be_had_are_no_difference(stored: tuple[Version, Path]) -> None:
    version, weights = stored
    weights.unlink()
    with pytest.raises(StageError, match="version 1 cannot be verified: the registry holds no weights of it"):
        derivation.derive(version, nothing)
    shutil.rmtree("mlartifacts")
    with pytest.raises(StageError, match="version 1 cannot be downloaded"):
        derivation.derive(version, nothing)


MAKEFILE = """
setup:
	@test -z "$$PYTHONPATH$$VIRTUAL_ENV$$SYNSET_PARAMS" || { echo "error: it hears of another checkout"; exit 1; }
	@grep -q broken requirements.lock && echo "error: no such package" && exit 1; true
	@mkdir -p .venv/bin
	@printf '#!/bin/sh\\necho %s of %s\\n' "$$(cat requirements.lock)" "$(PYTHON)" > .venv/bin/python
	@chmod +x .venv/bin/python
"""


def make_setup(command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> list[str]:
    """Runs a command as the flow does."""
    lines: list[str] = []
    if run_streamed(command, lines.append, Stop(), cwd=cwd, env=env):
        raise StageError(last_error(lines))
    return lines


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A checkout with a small Makefile; makes a commit with another lock, empty for none, and returns it."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "Makefile").write_text(MAKEFILE)
    (root / "environment.mk").write_text("export HERE ?= $(CURDIR)\n")
    git(root, "init", "-q")
    monkeypatch.setattr(derivation, "ROOT", root)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("SYNSET_PARAMS", "elsewhere")

    def locked(text: str) -> str:
        (root / derivation.LOCK).write_text(f"{text}\n")
        if not text:
            (root / derivation.LOCK).unlink()
        git(root, "add", "-A")
        return record(root, text or "none", "--allow-empty")

    return locked


def test_the_packages_are_those_that_the_commit_locks(locks: Callable[[str], str], tmp_path: Path) -> None:
    then, now = locks("torch==1"), locks("torch==2")
    tree = tmp_path / "tree"
    open_tree(derivation.ROOT, tree, then)
    assert derivation._python(tree, now, nothing) == sys.executable
    python = derivation._python(tree, then, make_setup)
    assert Path(python).is_relative_to(tree)
    assert make_setup([python], tree, derivation._environment(tree, python)) == [f"torch==1 of {sys.executable}"]


@pytest.mark.parametrize(("lock", "reason"), [("", "has no requirements.lock"), ("broken", "no such package")])
def test_packages_that_cannot_be_had_are_named(
    locks: Callable[[str], str], tmp_path: Path, lock: str, reason: str
) -> None:
    then = locks(lock)
    locks("torch==2")
    open_tree(derivation.ROOT, tmp_path / "tree", then)
    with pytest.raises(StageError, match=reason):
        derivation._python(tmp_path / "tree", then, make_setup)
