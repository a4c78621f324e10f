"""`python -m pipelines.housekeeping` (`make gc`): frees DVC's cache of what nothing names any more.

What branches, tags and the workspaces of all worktrees name stays, and what registered versions name, under whatever
name of a model: each gets a git tag `model/<name>/<number>`, which also keeps git from forgetting the commit. DVC then
goes by the tags.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from pipelines import environment
from pipelines.environment import ROOT
from pipelines.processes.flow_lock import exclusive
from pipelines.retrain.worktree import NOBODY, check_root, commit_of, git, text_at
from stages.params.register import Register
from stages.registry import artifacts, versions
from stages.registry.client import reachable, tracking_uri
from stages.registry.versions import Version
from stages.runtime.command import StageError, run
from stages.runtime.params_file import load_section

logger = logging.getLogger(__name__)

RECEIPT = Path("models/registered.json")
RECORDED = ("dvc.lock", "dvc.yaml", "params.yaml")
"""Files that a registration logged, and that name the version's data: those that its commit holds may be older."""


def keep_versions(name: str, root: Path = ROOT) -> list[str]:
    """Tags what each registered version was made from, and removes the tags of versions that are registered no more.

    Args:
        name: of the model that params.yaml registers. Presets register others, whose data is in the same cache.

    Returns:
        the tags.

    Raises:
        StageError: a version's commit is not in this clone, or this is not the registry; nothing was changed.
    """
    models = versions.model_names()
    if not models and (root / RECEIPT).exists():
        raise StageError(
            f"MLflow at {tracking_uri()} has no model, but this checkout has registered one ({RECEIPT}), so "
            f"which data to keep is unknown; nothing was removed. Is MLFLOW_TRACKING_URI that of your registry?"
        )
    found = versions.list_versions(name)
    if missing := [each for each in found if each.commit and not commit_of(root, each.commit)]:
        which = ", ".join(f"version {each.number} ({each.commit[:12]})" for each in missing)
        raise StageError(
            f"{name}: this clone lacks the commit of {which}, so which data to keep is unknown; nothing was removed. "
            f"`git fetch --all --tags` where it was pushed, or delete the version"
        )
    for other in set(models) - {name}:
        found += [each for each in versions.list_versions(other) if _is_ours(each, root)]
    wanted = {f"model/{each.name}/{each.number}": _snapshot(each, root) for each in found}
    _remove_tags(set(wanted), models, root)
    for tag, commit in wanted.items():
        git(root, "update-ref", f"refs/tags/{tag}", commit)
    return sorted(wanted)


def _is_ours(version: Version, root: Path) -> bool:
    """Whether this repository made a version of another model: a registry may be shared with other projects."""
    return bool(version.sha256) and (not version.commit or bool(commit_of(root, version.commit)))


def _remove_tags(wanted: set[str], models: list[str], root: Path) -> None:
    """Those of models that this registry does not have stay: they may be another registry's."""
    present = git(root, "for-each-ref", "--format=%(refname:strip=2)", "refs/tags/model/").splitlines()
    for tag in sorted(set(present) - wanted):
        if tag.split("/")[1] in models:
            git(root, "update-ref", "-d", f"refs/tags/{tag}")
        else:
            logger.warning("warning: this registry has no model of the tag %s; it stays until `git tag -d`", tag)


def _snapshot(version: Version, root: Path) -> str:
    """The version's commit, if that names all data that its registration named; else one after it that does.

    A version is often registered first and its dvc.lock committed afterwards, or never.
    """
    base = version.commit or commit_of(root, "HEAD")
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: artifacts.download(version.run_id, name, Path(temporary)) for name in RECORDED}
        texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path}
    if not texts.get("dvc.lock"):
        logger.warning("warning: no dvc.lock is recorded with version %d; that of %s counts", version.number, base[:12])
        return base
    if _outputs(texts["dvc.lock"]) <= _outputs(text_at(root, base, "dvc.lock")):
        return base
    return _commit_with(root, base, texts, f"what version {version.number} of {version.name} was made from")


def _outputs(lock: str) -> set[tuple[str, str]]:
    """Path and checksum of every output that a dvc.lock names."""
    stages: dict[str, Any] = (yaml.safe_load(lock) or {}).get("stages", {})
    return {(out["path"], str(out.get("md5"))) for stage in stages.values() for out in stage.get("outs", [])}


def _commit_with(root: Path, base: str, texts: dict[str, str], message: str) -> str:
    """A commit on top of `base` with other texts of some files, on no branch; the same one every time."""
    with tempfile.TemporaryDirectory() as temporary:
        index = {"GIT_INDEX_FILE": str(Path(temporary, "index")), "LC_ALL": "C"}
        when = {f"GIT_{who}_DATE": git(root, "log", "-1", "--format=%cI", base) for who in ("AUTHOR", "COMMITTER")}
        _plumb(root, index, "read-tree", base)
        for name, text in texts.items():
            blob = _plumb(root, index, "hash-object", "-w", "--stdin", text=text)
            _plumb(root, index, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}")
        tree = _plumb(root, index, "write-tree")
        return _plumb(root, index | when, *NOBODY, "commit-tree", tree, "-p", base, "-m", message)


def _plumb(root: Path, env: dict[str, str], *arguments: str, text: str | None = None) -> str:
    """`git` with another index, so that the one of the checkout stays as it is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments], cwd=root, env=kept | env, input=text, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise StageError(f"git in {root} failed: {' '.join(done.stderr.split())}; nothing was removed")
    return done.stdout.strip()


def collect(root: Path = ROOT, dry: bool = False, own_cache: bool = False) -> str:
    """Runs `dvc gc`; returns what it freed, in words.

    Args:
        own_cache: also where the cache lies outside the repository's checkouts, because no other clone uses it.

    Raises:
        StageError: the cache may be others' too, a worktree is not there, or DVC failed, most likely because it is at
            work in this checkout. Nothing was removed.
    """
    cache = Path(_dvc(root, "cache", "dir")[-1])
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


def main() -> None:
    """Tags versions, collects, and says what was freed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry", action="store_true", help="only say what would go (versions get their tags all the same)"
    )
    parser.add_argument(
        "--cache-of-our-own", action="store_true",
        help="the cache lies outside this checkout, and no other clone uses it: collect all the same",
    )  # fmt: skip
    arguments = parser.parse_args()
    environment.apply()
    name = load_section("register", Register).name
    check_root(ROOT)
    # Neither may be at work: what they have made and not committed yet, nothing names.
    with exclusive("retrain"), exclusive("verify"):
        with reachable():
            tags = keep_versions(name)
        print(f"kept for registered versions: {', '.join(tags) or 'nothing, there are none'}")
        print(collect(dry=arguments.dry, own_cache=arguments.cache_of_our_own))


if __name__ == "__main__":
    run(main)
