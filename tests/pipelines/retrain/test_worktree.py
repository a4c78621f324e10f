"""The worktree of a flow and the branch it ends in, on small repositories: whatever a kill left, the next run works."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines.retrain.batch_list import batches, with_batch, with_retracted
from pipelines.retrain.branch import (
    Branches,
    commit_retraining,
    interrupted,
    prepare,
    read_branches,
    refuse_if_checked_out,
    write_params,
)
from pipelines.retrain.worktree import (
    check_root,
    checked_out,
    commit_of,
    connect,
    contains,
    default_remote,
    is_tree,
    move_branch,
    open_tree,
    text_at,
    trailer,
)
from stages.params.retrain import Retrain
from stages.runtime.command import StageError
from stages.runtime.git import GitError, git
from tests.closure import ROOT
from tests.workspace import until

SETTINGS = Retrain()
NEW = {"role": "finetune", "source": "2026-11-23", "digest": "ab" * 32}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the project's params.yaml, a lock, metrics and DVC's configuration, on `main`."""
    root = tmp_path / "checkout"
    subprocess.run(["git", "init", "-q", "-b", "main", str(root)], check=True)
    for name in (".dvc/config", ".dvc/.gitignore", ".gitignore", "params.yaml"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"evaluate": {"cmd": "a"}}}))
    (root / "reports").mkdir()
    (root / "reports/metrics.json").write_text("1\n")
    commit(root, "begin")
    return root


@pytest.fixture
def tree(root: Path) -> Path:
    """Where the worktree will be."""
    return root / ".synset/retrain/tree"


def commit(folder: Path, message: str, **files: str) -> str:
    """Commits everything; `params_yaml="..."` is the new text of params.yaml."""
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    run(folder, "add", "-A")
    run(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", message)
    return commit_of(folder, "HEAD")


def run(folder: Path, *arguments: str) -> None:
    """git, which must succeed."""
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def params(root: Path) -> str:
    """params.yaml of the checkout."""
    return (root / "params.yaml").read_text()


def retrained(root: Path, tree: Path, name: str = "d-1") -> str:
    """A retraining from beginning to end, as far as git is concerned."""
    branches = read_branches(root, SETTINGS)
    prepare(root, tree, branches)
    write_params(tree, with_batch(branches.params, name, NEW))
    (tree / "reports/metrics.json").write_text(f"{name}\n")
    made = commit_retraining(tree, f"Retrain on {name}", "f" * 64)
    move_branch(root, "retrain", made, branches.tip)
    return made


# --------------------------------------------------------------------------------------------------------------- tree


def test_a_tree_is_detached_clean_and_keeps_what_git_ignores(root: Path, tree: Path) -> None:
    start = commit_of(root, "HEAD")
    open_tree(root, tree, start)
    (tree / "models").mkdir()
    (tree / "models/weights").touch()
    (tree / "stray").touch()
    (tree / "params.yaml").write_text("changed")
    open_tree(root, tree, start)
    assert (tree / "models/weights").exists()
    assert not (tree / "stray").exists()
    assert params(tree) == params(root)
    assert not git(tree, "branch", "--show-current")
    assert not git(root, "status", "--porcelain")


def test_a_tree_that_somebody_attached_to_a_branch_does_not_move_it(root: Path, tree: Path) -> None:
    first = commit_of(root, "HEAD")
    open_tree(root, tree, first)
    run(tree, "switch", "-qc", "theirs")
    second = commit(root, "more", params_yaml=params(root) + "# more\n")
    open_tree(root, tree, second)
    assert commit_of(root, "theirs") == first


@pytest.mark.parametrize("damage", ["no .git", "empty .git", "no tree", "no metadata", "locked", "half a HEAD"])
def test_a_damaged_tree_is_made_again(root: Path, tree: Path, damage: str) -> None:
    start = commit_of(root, "HEAD")
    open_tree(root, tree, start)
    metadata = root / ".git/worktrees/tree"
    if damage == "no .git":
        (tree / ".git").unlink()
    elif damage == "empty .git":
        (tree / ".git").write_text("")
    elif damage == "no tree":
        shutil.rmtree(tree)
        (metadata / "locked").write_text("initializing")
    elif damage == "no metadata":
        shutil.rmtree(metadata)
    elif damage == "locked":
        (metadata / "locked").write_text("initializing")
    else:
        (metadata / "HEAD").write_text("")
    open_tree(root, tree, start)
    assert is_tree(root, tree)
    assert commit_of(tree, "HEAD") == start == commit_of(root, "main")
    assert params(tree) == params(root)


def test_locks_that_a_kill_left_are_in_nobodys_way(root: Path, tree: Path) -> None:
    start = commit_of(root, "HEAD")
    open_tree(root, tree, start)
    metadata = root / ".git/worktrees/tree"
    for path in (metadata / "index.lock", metadata / "HEAD.lock", root / ".git/refs/heads/retrain.lock"):
        path.touch()
    (tree / ".dvc/tmp").mkdir()
    for name in ("lock", "rwlock", "rwlock.lock"):
        (tree / ".dvc/tmp" / name).write_text("{")
    assert contains(root, retrained(root, tree), start)
    assert not list((tree / ".dvc/tmp").iterdir())


@pytest.fixture
def opening(root: Path, tree: Path) -> Callable[..., "subprocess.Popen[bytes]"]:
    """Starts `open_tree` of a commit with many files, as leader of a process group."""
    for number in range(200):
        (root / f"file{number}").write_text("x" * 1000)
    start = commit(root, "many files")

    def begin(**environment: str) -> "subprocess.Popen[bytes]":
        shutil.rmtree(tree, ignore_errors=True)
        code = "from pathlib import Path; from pipelines.retrain.worktree import open_tree; "
        code += f"open_tree(Path({str(root)!r}), Path({str(tree)!r}), {start!r})"
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)

    return begin


def check_repaired(root: Path, tree: Path) -> None:
    """The next call makes the tree whole."""
    open_tree(root, tree, commit_of(root, "HEAD"))
    assert not git(tree, "status", "--porcelain")
    assert len(list(tree.glob("file*"))) == 200


def test_a_kill_between_any_two_steps_of_making_the_tree_is_repaired(
    root: Path, tree: Path, opening: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    faults = {"PYTHONPATH": f"{ROOT / 'tests/faults'}:{ROOT}"}
    for count in range(1, 100):
        ended = opening(SYNSET_FAULT=f"kill open_tree subprocess.Popen git {count}", **faults).wait()
        check_repaired(root, tree)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert count > 3


def test_a_kill_while_git_writes_the_files_is_repaired(
    root: Path, tree: Path, tmp_path: Path, opening: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    fifo, mark = tmp_path / "fifo", tmp_path / "mark"
    os.mkfifo(fifo)  # whoever reads it waits for ever
    (root / ".git/info/attributes").write_text("file150 filter=stop\n")
    git(root, "config", "filter.stop.smudge", f"touch {mark}; cat {fifo}")
    process = opening()
    until(mark.exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    git(root, "config", "filter.stop.smudge", "cat")
    check_repaired(root, tree)


def test_dvc_in_the_tree_has_the_cache_remotes_and_secrets_of_the_checkout(root: Path, tree: Path) -> None:
    with (root / ".dvc/config").open("a") as file:
        file.write("    dir = ../../cache\n[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n")
        file.write("    keyfile = keys/id\n['remote \"far\"']\n    url = s3://bucket/x\n")
    text = (root / ".dvc/config").read_text().replace("[core]\n    remote", "    remote", 1)
    (root / ".dvc/config").write_text(
        text.replace("    remote = store\n", "").replace("[core]\n", "[core]\n    remote = store\n", 1)
    )
    (root / ".dvc/config.local").write_text("['remote \"far\"']\n    secret_access_key = s3cr3t\n")
    start = commit(root, "remotes")
    open_tree(root, tree, start)
    dvc = [sys.executable, "-m", "dvc"]
    ask = [["cache", "dir"], ["remote", "list"], ["config", "remote.far.secret_access_key"], ["config", "core.remote"]]
    said = [subprocess.run([*dvc, *each], cwd=tree, capture_output=True, text=True, check=True).stdout for each in ask]
    assert said[0].strip() == str(root.parent / "cache")
    assert str(root.parent / "store") in said[1]
    assert "s3://bucket/x" in said[1]
    assert [said[2].strip(), said[3].strip()] == ["s3cr3t", "store"]
    assert default_remote(root) == "store"
    assert (tree / ".dvc/config.local").stat().st_mode & 0o077 == 0
    assert not git(tree, "status", "--porcelain")
    connect(root, tree)  # again


def test_a_remote_of_the_user_is_none_of_the_checkout(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "global").mkdir()
    (tmp_path / "global/config").write_text("[core]\n    remote = own\n['remote \"own\"']\n    url = /somewhere\n")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    assert default_remote(root) == ""


def test_git_never_climbs_to_a_checkout_above(root: Path, tmp_path: Path) -> None:
    inside = root / "data"
    inside.mkdir()
    with pytest.raises(GitError):
        git(inside, "status")
    with pytest.raises(StageError, match="not the root"):
        check_root(inside)
    with pytest.raises(StageError, match="not the root"):
        check_root(tmp_path)
    check_root(root)


# ----------------------------------------------------------------------------------------------------------- branches


def test_a_retraining_is_one_commit_on_a_branch_that_moves_at_the_end(root: Path, tree: Path) -> None:
    start = commit_of(root, "main")
    branches = read_branches(root, SETTINGS)
    assert (branches.tip, branches.ahead, branches.start) == ("", False, start)
    made = retrained(root, tree)
    assert commit_of(root, "retrain") == made
    assert commit_of(root, "retrain^") == start
    assert trailer(root, made, "Model-SHA256") == "f" * 64
    assert list(batches(text_at(root, made, "params.yaml"))) == ["upstream", "target", "d-1"]
    assert text_at(root, made, "reports/metrics.json") == "d-1\n"
    assert commit_of(root, "main") == start
    assert not git(root, "status", "--porcelain")
    assert git(root, "diff", "--stat", f"{start}", made, "--", "params.yaml").endswith("4 insertions(+)")


def test_the_base_is_merged_and_locks_and_reports_are_no_conflict(root: Path, tree: Path) -> None:
    retrained(root, tree)
    lock = yaml.safe_dump({"schema": "2.0", "stages": {"evaluate": {"cmd": "b"}, "scan@pets": {"cmd": "c"}}})
    text = with_batch(params(root), "pets", {"role": "finetune", "source": "pets"}).replace(
        "margin: 0.01", "margin: 0.02"
    )
    (root / "reports/metrics.json").write_text("of main\n")
    base = commit(root, "pets", params_yaml=text, dvc_lock=lock)
    branches = read_branches(root, SETTINGS)
    assert branches.ahead
    made = retrained(root, tree, "d-2")
    assert contains(root, made, base)
    found = text_at(root, made, "params.yaml")
    assert list(batches(found)) == ["upstream", "target", "d-1", "pets", "d-2"]
    assert "margin: 0.02" in found
    assert yaml.safe_load(text_at(root, made, "dvc.lock"))["stages"] == {
        "evaluate": {"cmd": "b"},
        "scan@pets": {"cmd": "c"},
    }
    assert not read_branches(root, SETTINGS).ahead
    assert trailer(root, f"{made}^", "Model-SHA256") == ""


@pytest.mark.parametrize("name", ["params.yaml", "code.py"])
def test_any_other_conflict_stops_with_what_to_do(root: Path, tree: Path, name: str) -> None:
    commit(root, "code", code_py="a = 1\n")
    retrained(root, tree)
    edited = params(tree).replace("alpha: 0.05", "alpha: 0.01") if name == "params.yaml" else "a = 2\n"
    run(tree, "switch", "-q", "retrain")
    tip = commit(tree, "by hand", **{name.replace(".", "_"): edited})
    open_tree(root, tree, tip)
    edited = params(root).replace("alpha: 0.05", "alpha: 0.02") if name == "params.yaml" else "a = 3\n"
    commit(root, "also", **{name.replace(".", "_"): edited})
    with pytest.raises(StageError, match=rf"`main` cannot be merged into `retrain`: .*{name}.*git switch retrain"):
        prepare(root, tree, read_branches(root, SETTINGS))
    assert commit_of(root, "retrain") == tip
    assert not git(tree, "status", "--porcelain")


def test_a_branch_that_somebody_has_checked_out_is_left_alone(root: Path, tree: Path, tmp_path: Path) -> None:
    retrained(root, tree)
    run(root, "worktree", "add", "-q", str(tmp_path / "theirs"), "retrain")
    assert checked_out(root, "retrain", tree) == tmp_path / "theirs"
    with pytest.raises(StageError, match="theirs"):
        refuse_if_checked_out(root, tree, "retrain")
    shutil.rmtree(tmp_path / "theirs")
    refuse_if_checked_out(root, tree, "retrain")


def test_a_branch_that_moved_meanwhile_stays_where_it_is(root: Path, tree: Path) -> None:
    first = retrained(root, tree)
    main = commit_of(root, "main")
    run(root, "branch", "-f", "retrain", "main")
    with pytest.raises(GitError):
        move_branch(root, "retrain", first, first)
    assert commit_of(root, "retrain") == main


def test_a_commit_whose_branch_did_not_move_is_found_again(root: Path, tree: Path) -> None:
    branches = read_branches(root, SETTINGS)
    prepare(root, tree, branches)
    assert interrupted(tree, branches.start) is None
    made = commit_retraining(tree, "Retrain", "f" * 64)
    assert interrupted(tree, branches.start) == (made, "f" * 64)
    move_branch(root, "retrain", made, "")
    assert interrupted(tree, made) is None


def test_a_base_that_is_not_there_is_named(root: Path) -> None:
    with pytest.raises(StageError, match="no branch `nowhere`"):
        read_branches(root, Retrain(base="nowhere"))


def test_after_a_batch_was_taken_back_refused_deliveries_are_judged_anew(root: Path) -> None:
    before = read_branches(root, SETTINGS).rules
    text = (root / "params.yaml").read_text()
    commit(root, "no rule", params_yaml=text.replace("min_images: 1", "min_images: 2"))
    assert read_branches(root, SETTINGS).rules == before
    commit(root, "taken back", params_yaml=with_retracted(text, ["d-1"]))
    assert read_branches(root, SETTINGS).rules != before


def test_a_machine_without_a_name_for_git_can_commit(root: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(root / "nowhere"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    run(root, "config", "user.useConfigOnly", "true")
    for name in ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"):
        monkeypatch.delenv(f"GIT_{name}", raising=False)
    made = retrained(root, tree)
    assert git(root, "log", "-1", "--format=%an", made) == "Synset"


def test_what_is_old_counts_from_the_last_commit_of_the_lock(root: Path) -> None:
    branches: Branches = read_branches(root, SETTINGS)
    assert time.time() - branches.trained < 60 * 60
    run(root, "rm", "-q", "dvc.lock")
    assert branches.policy == Retrain()
