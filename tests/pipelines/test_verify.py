"""Deriving registered versions again; the slow tests do it for real, on a small sample, and put a version in force."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipelines import verify
from pipelines.maintenance.derivation import Finding
from stages.registry import versions
from stages.registry.versions import Version
from stages.runtime.command import StageError
from tests.workspace import Workspace

NAME = "synset-sample"


@pytest.mark.parametrize(
    ("came_of_it", "told"),
    [
        (Finding("differs", "other weights"), [("bells version 7 differs", "bells version 7: differs: other weights")]),
        (StageError("no space"), [("verify failed", "no space")]),
        (Finding("not comparable", "another CPU"), []),
        (Finding("reproduced", "the same"), []),
    ],
)
def test_somebody_is_told_of_what_differs_and_of_a_failure(
    monkeypatch: pytest.MonkeyPatch, came_of_it: Finding | StageError, told: list[tuple[str, str]]
) -> None:
    def derive(*_: object) -> Finding:
        if isinstance(came_of_it, StageError):
            raise came_of_it
        return came_of_it

    sent: list[tuple[str, str]] = []
    chosen = Version("bells", 7, "", "", {}, (), "", 0)
    for name, instead in {
        "derive": derive,
        "choose": lambda *_: chosen,
        "exclusive": lambda *_: nullcontext(),
        "record": lambda *_: None,
        "create_markdown_artifact": lambda **_: None,
        "tell": lambda title, body: sent.append((title, body)),
    }.items():
        monkeypatch.setattr(verify, name, instead)
    state = verify.verify.fn(7)
    assert sent == told
    assert state.is_failed() == bool(told)


# ------------------------------------------------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A checkout whose version 1 was trained two commits ago, under MLflow's working directory."""
    workspace = Workspace(tmp_path_factory.mktemp("trained"))
    workspace.write_params(workspace.params | {"finetune": {"epochs": 1, "batch_size": 32, "scratch": False}})
    commit(workspace, "faster")
    workspace.repro()
    commit(workspace, "the first model")  # its lock, after the commit that the version names
    (workspace.root / "README.md").write_text("Another text.\n")
    commit(workspace, "something else")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield workspace


def commit(workspace: Workspace, message: str) -> None:
    """Commits everything."""
    for command in (["add", "-A"], ["-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", message]):
        subprocess.run(["git", *command], cwd=workspace.root, check=True)


def version(number: int) -> Version:
    """A version as it is now."""
    return next(each for each in versions.list_versions(NAME) if each.number == number)


def flow(workspace: Workspace, *command: str) -> tuple[int, str]:
    """Exit code and output of a flow."""
    done = workspace.run("python", "-m", *command)
    return done.returncode, done.stdout


def untouched(workspace: Workspace) -> list[str]:
    """What a flow may not change in a checkout."""
    commands = (["status", "--porcelain"], ["rev-parse", "HEAD"], ["worktree", "list"])
    return [workspace.run("git", *command).stdout for command in commands]


@pytest.fixture
def damaged(trained: Workspace) -> Iterator[Path]:
    """One byte of the weights in the registry is another; as before afterwards."""
    (weights,) = (trained.root / "mlartifacts").rglob("model.safetensors")
    assert weights.stat().st_nlink == 1  # never DVC's
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    yield weights
    weights.write_bytes(whole)


@pytest.mark.slow
def test_a_damaged_model_is_neither_promoted_nor_reproduced(trained: Workspace, damaged: Path) -> None:
    versions.set_alias(version(1), "champion")
    code, output = flow(trained, "pipelines.reconcile")
    assert code == 0, output
    assert "version 1 is refused: its weights are not those registered" in output
    assert version(1).aliases == ("challenger",)
    code, output = flow(trained, "pipelines.verify", "1")
    assert code == 1, output
    assert version(1).tags["verify"].startswith("differs ")
    assert "what the registry holds is not what was registered" in version(1).tags["verify.detail"]


@pytest.mark.slow
def test_a_version_of_two_commits_ago_comes_into_force_and_is_reproduced(trained: Workspace) -> None:
    versions.set_alias(version(1), "champion")
    code, output = flow(trained, "pipelines.reconcile")
    assert code == 0, output
    assert f"{NAME}: version 1 is in force (passed)" in output
    assert set(version(1).aliases) == {"challenger", "champion", "serving"}
    tag = trained.run("git", "rev-parse", "champion").stdout.strip()
    assert tag == version(1).commit

    before = untouched(trained)
    cached = sorted((trained.root / ".dvc/cache").rglob("*"))
    code, output = flow(trained, "pipelines.verify")
    assert code == 0, output
    assert version(1).tags["verify"].startswith("reproduced ")
    assert f"the same weights and figures, from commit {version(1).commit[:12]}" in output
    ran = re.findall("Running stage '([^']+)'", output)
    stages = ["validate", "pretrain", "finetune", "evaluate"]
    assert [stage for stage in ran if "@" not in stage] == stages
    assert {stage for stage in ran if "@" in stage} == {
        f"{stage}@{batch}" for stage in ("scan", "shard") for batch in trained.params["batches"]
    }
    assert sorted((trained.root / ".dvc/cache").rglob("*")) == cached
    assert untouched(trained) == before
    assert not (trained.root / ".synset/verify/tree").exists()


@pytest.mark.slow
def test_a_version_of_another_seed_is_refused_as_dirty_and_differs_where_it_claims_not_to_be(
    trained: Workspace,
) -> None:
    finetune = trained.params["finetune"] | {"seed": 2}
    trained.write_params(trained.params | {"finetune": finetune})
    trained.repro()
    code, output = flow(trained, "pipelines.verify", "2")
    assert code == 1
    assert "uncommitted changes" in output
    assert "verify" not in version(2).tags
    versions.delete_tag(version(2), "git.dirty")
    trained.run("git", "checkout", "params.yaml", "dvc.lock")
    code, output = flow(trained, "pipelines.verify", "2")
    assert code == 1, output
    assert version(2).tags["verify"].startswith("differs ")
    assert f"instead of {version(2).sha256[:12]}" in version(2).tags["verify.detail"]


@pytest.mark.slow
def test_raw_data_that_is_gone_is_pulled_or_named(trained: Workspace, tmp_path: Path) -> None:
    trained.run("dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    done = trained.run("dvc", "push")
    assert done.returncode == 0, done.stdout
    shutil.rmtree(trained.root / ".dvc/cache/files")
    trained.run("dvc", "remote", "remove", "--local", "store")
    code, output = flow(trained, "pipelines.verify", "1")
    assert code == 1
    assert "its raw data is not in DVC's cache, and there is no remote to pull it from" in output
    trained.run("dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    code, output = flow(trained, "pipelines.verify", "1")
    assert code == 0, output
