"""Frees DVC's cache of everything that no branch, tag or workspace names, by `dvc gc`."""

import re
import subprocess
import sys
from pathlib import Path

from pipelines.environment import ROOT
from pipelines.retrain.worktree import cache_folder
from stages.runtime.command import StageError
from stages.runtime.git import git


def collect(root: Path = ROOT, dry: bool = False, own_cache: bool = False) -> str:
    """Runs `dvc gc`; returns what it freed, in words.

    Args:
        own_cache: also where the cache lies outside the repository's checkouts, because no other clone uses it.

    Raises:
        StageError: the cache may be others' too, a worktree is not there, or DVC failed, most likely because it is at
            work in this checkout. Nothing was removed.
    """
    cache = cache_folder(root)
    trees = _worktrees(root)
    if not (own_cache or dry or any(cache.resolve().is_relative_to(tree.resolve()) for tree in (root, *trees))):
        raise StageError(
            f"DVC's cache {cache} lies outside this checkout: other clones may use it, and what only they name would "
            f"be removed; nothing was. If none does: `python -m pipelines.housekeeping --cache-of-our-own`"
        )
    before = _sizes(cache)
    keep = ["--workspace", "--all-branches", "--all-tags"]
    others = [str(tree) for tree in trees if tree.resolve() != root.resolve()]
    lines = _dvc(
        root, "gc", "--force", *keep, *(["--projects", *others] if others else []), *(["--dry"] if dry else [])
    )
    git(root, "worktree", "prune")
    if dry:
        return "\n".join(re.sub("^Remov(ed|ing)", "would remove", line) for line in lines)
    left = _sizes(cache)
    freed = sum(before[path] for path in before.keys() - left.keys())
    return (
        f"freed {_size(freed)} in {len(before.keys() - left.keys())} files; {_size(sum(left.values()))} stay in {cache}"
    )


def _worktrees(root: Path) -> list[Path]:
    """Checkouts of this repository that DVC works in, this one first.

    Raises:
        StageError: one is not there, so what its workspace names is unknown.
    """
    entries = [entry.splitlines() for entry in git(root, "worktree", "list", "--porcelain").split("\n\n")]
    paths = [Path(lines[0].removeprefix("worktree ")) for lines in entries if "bare" not in lines]
    # Our own trees go with `make clean`, for good.
    kept = [path for path in paths if (path / ".git").exists() or not path.is_relative_to(root.resolve() / ".synset")]
    if missing := [str(path) for path in kept if not (path / ".git").exists()]:
        raise StageError(
            f"the worktree {', '.join(missing)} is not there, so which data it names is unknown; nothing was removed. "
            f"Mount it, or, if it is gone for good, `git worktree prune`"
        )
    return [path for path in kept if (path / ".dvc").is_dir()]


def _dvc(root: Path, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))
        raise StageError(f"`dvc {arguments[0]}` failed: {said or done.stderr.strip()}")
    return done.stdout.splitlines()


def _sizes(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in cache.rglob("*") if path.is_file()}


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
