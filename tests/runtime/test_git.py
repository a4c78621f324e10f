"""The one git runner: its errors, its environment, no hooks."""

import os
from pathlib import Path

import pytest

from stages.runtime.git import IDENTITY, GitError, git, git_code


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "first", env=IDENTITY)
    return tmp_path


def test_an_error_has_the_words_of_git(checkout: Path) -> None:
    with pytest.raises(GitError, match=r"`git rev-parse` failed in .*Needed a single revision"):
        git(checkout, "rev-parse", "--verify", "nothing")
    assert git_code(checkout, "rev-parse", "--verify", "--quiet", "nothing") == (1, "")
    with pytest.raises(GitError, match="there is no folder"):
        git(checkout / "nowhere", "status")


def test_neither_hooks_nor_the_variables_of_hooks_count(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = checkout / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    hook.chmod(0o755)
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))
    git(checkout, "commit", "--quiet", "--allow-empty", "-m", "second", env=IDENTITY)
    assert git(checkout, "log", "--format=%an %s").splitlines() == ["Synset second", "Synset first"]


def test_only_who_asks_for_it_works_below_the_root(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = checkout / "below"
    below.mkdir()
    with pytest.raises(GitError, match="not a git repository"):
        git(below, "rev-parse", "HEAD")
    assert git_code(below, "rev-parse", "--show-prefix", parents=True) == (0, "below/")
    monkeypatch.chdir(below)
    with pytest.raises(GitError, match="not a git repository"):
        git(Path(), "rev-parse", "HEAD")


def test_it_reads_its_input_and_its_own_index(checkout: Path, tmp_path: Path) -> None:
    blob = git_code(checkout, "hash-object", "-w", "--stdin", text="words\n")[1]
    assert git(checkout, "cat-file", "-p", blob) == "words"
    index = {"GIT_INDEX_FILE": str(tmp_path / "other-index")}
    git(checkout, "update-index", "--add", "--cacheinfo", f"100644,{blob},file", env=index)
    assert git(checkout, "ls-files", env=index) == "file"
    assert git(checkout, "ls-files") == ""
    assert "GIT_INDEX_FILE" not in os.environ
