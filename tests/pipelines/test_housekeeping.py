"""`make gc` over a DVC project of one tiny stage: nothing that a version names is lost, and what nothing names goes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.maintenance.cache import collect
from pipelines.maintenance.version_tags import tag_versions
from stages.registry import versions
from stages.registry.client import open_client
from stages.registry.versions import Version
from stages.runtime.command import StageError

ROOT = Path(__file__).resolve().parents[2]
NAME = "bells"
STAGE = {"cmd": "cp params.yaml out", "params": ["text"], "outs": ["out"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], None]) -> Iterator[Path]:
    """A repository with DVC in which no version is registered yet; its cache holds what `make` made."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("DVC_SITE_CACHE_DIR", str(root / ".dvc/site"))
        new_database(root)
        for name, value in {"NAME": "n", "EMAIL": "e@example.org"}.items():
            patch.setenv(f"GIT_AUTHOR_{name}", value)
            patch.setenv(f"GIT_COMMITTER_{name}", value)
        subprocess.run(["git", "init", "-q", "-b", "main"], check=True)
        (root / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc/config", root / ".dvc/config")
        (root / ".gitignore").write_text("/out\n/mlflow.db\n/mlartifacts/\n/tree/\n.dvc/*\n!.dvc/config\n")
        (root / "dvc.yaml").write_text(json.dumps({"stages": {"copy": STAGE}}))
        yield root


def dvc(*arguments: str) -> None:
    """`dvc`, which must succeed."""
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], check=True)


def git(*arguments: str) -> str:
    """What git says."""
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(message: str) -> str:
    """Commits everything."""
    git("add", "-A")
    git("commit", "-q", "--allow-empty", "-m", message)
    return git("rev-parse", "HEAD")


def make(text: str) -> None:
    """Another output, in DVC's cache and in dvc.lock."""
    Path("params.yaml").write_text(f"text: {text}\n")
    dvc("repro")


def register(of: str, model_name: str = NAME) -> Version:
    """A version of that commit, with the files that a registration logs as they lie here."""
    client = open_client()
    found = client.get_experiment_by_name("e")
    run = client.create_run(found.experiment_id if found else client.create_experiment("e"))
    for name in ("dvc.lock", "dvc.yaml", "params.yaml"):
        client.log_artifact(run.info.run_id, name)
    model = client.create_logged_model(run.info.experiment_id, "model", source_run_id=run.info.run_id)
    tags = {"git.commit": of} if of else {}
    return versions.create_version(model_name, "About", f"models:/{model.model_id}", run.info.run_id, tags, "Card")


def in_cache() -> set[str]:
    """The texts of everything in DVC's cache."""
    files = [path.read_text() for path in Path(".dvc/cache/files").rglob("*") if path.is_file()]
    return {text.removeprefix("text: ").strip() for text in files}


@pytest.mark.slow
def test_what_versions_branches_tags_and_workspaces_name_stays_and_the_rest_goes(project: Path) -> None:
    make("of-a-version")
    registered = register(commit("a version, its lock committed with it"))
    before_lock = commit("code of the next version")
    make("lock-committed-later")
    later = register(before_lock)
    commit("its lock")
    make("never-committed")
    dirty = register(before_lock)
    make("of-a-branch")
    git("checkout", "-q", "-b", "side")
    commit("a branch")
    git("checkout", "-q", "main")
    make("of-a-version-that-was-deleted")
    deleted = register(commit("a version that will be deleted"))
    make("of-another-worktree")
    git("worktree", "add", "-q", "--detach", "tree")
    shutil.copy("dvc.lock", "tree/dvc.lock")
    shutil.copy("params.yaml", "tree/params.yaml")
    Path("tree/.dvc/config.local").write_text(f"[cache]\n    dir = {project}/.dvc/cache\n")
    make("of-nothing")
    make("of-the-workspace")
    status = git("status", "--porcelain")
    assert len(in_cache()) == 8

    tags = tag_versions(NAME, project)
    assert tags == [f"model/{NAME}/{n}" for n in (1, 2, 3, 4)]
    assert git("rev-parse", tags[0]) == registered.commit
    assert git("rev-parse", f"{tags[1]}^") == later.commit
    commits = git("for-each-ref", "refs/tags")
    assert tag_versions(NAME, project) == tags
    assert git("for-each-ref", "refs/tags") == commits  # the same ones every time

    git("branch", "-q", "-f", "main-before", "HEAD")
    git("reset", "-q", "--soft", "HEAD~1")  # so that nothing but the version names its data
    git("branch", "-q", "-D", "main-before")
    versions.delete_version(deleted)
    tags = tag_versions(NAME, project)
    assert f"model/{NAME}/4" not in git("tag", "--list").split()
    assert dirty.commit == before_lock

    said = collect(project, dry=True)
    assert "would remove 2 objects" in said
    assert "Remov" not in said
    assert len(in_cache()) == 8
    said = collect(project)
    assert said.startswith("freed 0.0 MB in 2 files")
    kept = {"of-a-version", "lock-committed-later", "never-committed", "of-a-branch", "of-another-worktree"}
    assert in_cache() == kept | {"of-the-workspace"}
    assert set(git("status", "--porcelain").split()) >= {"dvc.lock"} <= set(status.split())

    git("checkout", "-q", "-f", tags[2])  # what was never committed can be had again
    dvc("checkout")
    assert Path("out").read_text() == "text: never-committed\n"
    git("checkout", "-q", "-f", "main")


def test_a_version_of_an_unknown_commit_stops_it(project: Path) -> None:
    commit("one")
    for name in ("dvc.lock", "params.yaml"):
        Path(name).touch()
    number = register("0" * 40).number
    tags = git("tag", "--list")
    with pytest.raises(StageError, match=rf"lacks the commit of version {number} .*nothing was removed"):
        tag_versions(NAME, project)
    assert git("tag", "--list") == tags


@pytest.fixture
def apart(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_database: Callable[[Path], None]) -> Path:
    """The same repository with an empty registry, a commit, and the files that a registration logs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    new_database(tmp_path)
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    Path("params.yaml").touch()
    commit("apart")
    return project


def test_what_versions_of_other_models_were_made_from_is_kept_too(apart: Path) -> None:
    """`cp presets/X.yaml params.yaml` registers under another name, with data in the same cache."""
    for of in (git("rev-parse", "HEAD"), "0" * 40):  # the second is another project's
        versions.finish_version(register(of, "other"), "sha")
    assert tag_versions(NAME, apart) == ["model/other/1"]
    versions.delete_version(versions.list_versions("other")[-1])
    assert tag_versions(NAME, apart) == []
    assert "model/other/1" not in git("tag", "--list").split()


def test_what_was_made_by_an_edited_graph_is_kept_with_that_graph(apart: Path) -> None:
    """DVC keeps of a commit what its dvc.yaml names."""
    graph, edited = Path("dvc.yaml").read_text(), {"stages": {"copy": STAGE | {"outs": ["other"]}}}
    Path("dvc.yaml").write_text(json.dumps(edited))
    out = {"path": "other", "md5": "d41d8cd98f00b204e9800998ecf8427e"}
    Path("dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"copy": {"cmd": "", "outs": [out]}}}))
    register(git("rev-parse", "HEAD"))
    git("checkout", "-q", "dvc.yaml", "dvc.lock")
    assert tag_versions(NAME, apart) == [f"model/{NAME}/1"]
    assert json.loads(git("show", f"model/{NAME}/1:dvc.yaml")) == edited
    assert Path("dvc.yaml").read_text() == graph
    git("tag", "-d", f"model/{NAME}/1")


@pytest.fixture
def elsewhere(apart: Path, tmp_path: Path) -> Iterator[Path]:
    """An object that another clone made, in a cache outside of the checkout that both use."""
    cached = tmp_path / "cache/files/md5/d4/1d8cd98f00b204e9800998ecf8427e"
    cached.parent.mkdir(parents=True)
    cached.write_text("")
    local = apart / ".dvc/config.local"
    local.write_text(f"[cache]\n    dir = {tmp_path}/cache\n")
    yield cached
    local.unlink()


def test_a_cache_that_other_clones_may_use_is_left_alone_unless_it_is_said_that_none_does(
    apart: Path, elsewhere: Path
) -> None:
    with pytest.raises(StageError, match=r"other clones may use it.*housekeeping --cache-of-our-own"):
        collect(apart)
    assert elsewhere.exists()
    assert collect(apart, own_cache=True).startswith("freed 0.0 MB in 1 files")
    assert not elsewhere.exists()


@pytest.fixture
def worktree(apart: Path, tmp_path: Path) -> Iterator[Path]:
    """A worktree of the repository, with the cache of the checkout."""
    tree = tmp_path / "worktree"
    git("worktree", "add", "-q", "--detach", str(tree))
    (tree / ".dvc/config.local").write_text(f"[cache]\n    dir = {apart}/.dvc/cache\n")
    yield tree
    git("worktree", "remove", "--force", "--force", str(tree))


def test_the_cache_of_a_repository_is_that_of_its_worktrees_too(worktree: Path) -> None:
    assert collect(worktree).startswith("freed ")


def test_a_worktree_that_is_not_there_just_now_stops_it(apart: Path, worktree: Path) -> None:
    hidden = worktree.rename(worktree.with_name("unmounted"))
    worktree.mkdir()  # where it is mounted
    with pytest.raises(StageError, match=rf"the worktree {worktree} is not there.*`git worktree prune`"):
        collect(apart)
    assert str(worktree) in git("worktree", "list")
    worktree.rmdir()
    hidden.rename(worktree)


def test_a_tree_of_our_own_that_went_with_make_clean_does_not(apart: Path) -> None:
    git("worktree", "add", "-q", "--detach", ".synset/retrain/tree")
    shutil.rmtree(".synset")
    assert collect(apart).startswith("freed ")
    assert ".synset" not in git("worktree", "list")


def test_another_registry_costs_no_data(apart: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MLFLOW_TRACKING_URI forgotten: an empty database takes the place of the team's."""
    tag = f"model/{NAME}/1"
    git("tag", "-f", tag)
    assert tag_versions(NAME, apart) == []
    assert tag in git("tag", "--list").split()
    assert f"no model of the tag {tag}" in caplog.text
    receipt = Path("models/registered.json")
    receipt.parent.mkdir(exist_ok=True)
    receipt.write_text("{}")
    with pytest.raises(StageError, match="Is MLFLOW_TRACKING_URI that of your registry"):
        tag_versions(NAME, apart)
    receipt.unlink()
    git("tag", "-d", tag)
