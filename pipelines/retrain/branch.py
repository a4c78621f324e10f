"""The branch that retraining commits to: its merge with the base, and the commit of a retraining.

Everything happens in a worktree with a detached HEAD. The branch itself moves once, at the very end.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.retrain import worktree
from pipelines.retrain.batch_list import batches, lock_of, merge, merge_lock
from pipelines.retrain.worktree import commit_of, record, text_at
from stages.params.retrain import Retrain
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import write_text
from stages.runtime.git import git
from stages.runtime.params_file import check, parse_params

PARAMS, LOCK = str(layout.PARAMS), str(layout.DVC_LOCK)
TRAILER = "Model-SHA256"
"""The trailer of a retraining's commit that names the weights; a run after a kill finds the version by it."""


@dataclass(frozen=True)
class Branches:
    """The branch and its base as they are now."""

    name: str
    base: str
    tip: str
    """The branch's commit; empty where there is no such branch yet."""
    base_tip: str
    ahead: bool
    """Whether the base has what the branch lacks."""
    params: str
    """params.yaml of both, merged."""
    trained: float
    """When dvc.lock was last committed, in seconds since the epoch; 0 for never."""

    @property
    def start(self) -> str:
        """Where a retraining begins."""
        return self.tip or self.base_tip

    @property
    def policy(self) -> Retrain:
        """The merged section `retrain`: what is committed counts, not what lies in somebody's checkout."""
        return check("retrain", self.section("retrain"), Retrain, Path(f"{self.base}:{PARAMS}"))

    @property
    def rules(self) -> str:
        """Identifies the rules that a delivery is judged by: the limits, and the batches that were taken back."""
        sections = [self.section("validate"), self.section("split"), list(self.policy.retracted)]
        return json.dumps(sections, sort_keys=True, default=str)

    def section(self, name: str) -> dict[str, Any]:
        """Plain values of a section of params.yaml."""
        return dict((parse_params(self.params, f"{self.base}:{PARAMS}")).get(name) or {})


def read_branches(root: Path, settings: Retrain) -> Branches:
    """Reads the branch and its base.

    Raises:
        StageError: there is no base, or their params.yaml cannot be merged.
    """
    tip, base = commit_of(root, f"refs/heads/{settings.branch}"), commit_of(root, settings.base)
    if not base:
        raise StageError(f"there is no branch `{settings.base}` (retrain.base in params.yaml); name one that exists")
    start = tip or base
    ahead = not worktree.contains(root, start, base)
    params = text_at(root, start, PARAMS)
    if not params:
        raise StageError(f"there is no {PARAMS} in {start[:12]}; commit it on `{settings.base}`")
    if ahead:
        params = _united(root, settings, start, base)
    trained = git(root, "log", "-1", "--format=%ct", start, "--", LOCK)
    return Branches(settings.branch, settings.base, tip, base, ahead, params, float(trained or 0))


def refuse_if_checked_out(root: Path, tree: Path, branch: str) -> None:
    """Raises StageError where the branch is checked out: its files would no longer be those of the branch."""
    if where := worktree.checked_out(root, branch, besides=tree):
        raise StageError(f"the branch `{branch}` is checked out in {where}; `git switch` to another one there")


def prepare(root: Path, tree: Path, branches: Branches) -> None:
    """The worktree at the branch's tip, with its base merged.

    Raises:
        StageError: they change the same lines, other than in `batches`, dvc.lock and reports/.
    """
    refuse_if_checked_out(root, tree, branches.name)
    worktree.open_tree(root, tree, branches.start)
    if branches.ahead:
        _merge(tree, branches)
    write_params(tree, branches.params)


def write_params(tree: Path, text: str) -> None:
    """Writes params.yaml, and removes other batches from dvc.lock."""
    write_text(tree / PARAMS, text)
    if (tree / LOCK).exists():
        lock = (tree / LOCK).read_text(encoding="utf-8")
        if (kept := lock_of(lock, list(batches(text)))) != lock:
            write_text(tree / LOCK, kept)


def commit_retraining(tree: Path, message: str, model_sha256: str) -> str:
    """Commits the results of a retraining on the detached HEAD; returns the commit."""
    return worktree.commit_all(
        tree, [PARAMS, LOCK, str(layout.REPORTS)], f"{message.rstrip()}\n\n{TRAILER}: {model_sha256}\n"
    )


def interrupted(tree: Path, start: str) -> tuple[str, str] | None:
    """The commit of a retraining that was killed before the branch moved, and the sha256 of its model.

    Args:
        start: where a retraining begins now. It may be the commit of an earlier retraining itself.
    """
    head = commit_of(tree, "HEAD")
    model = model_of(tree, head) if head else ""
    return (head, model) if model and not (start and worktree.contains(tree, start, head)) else None


def model_of(folder: Path, commit: str) -> str:
    """sha256 of the model that a retraining committed; empty for any other commit."""
    return worktree.trailer(folder, commit, TRAILER)


def _merge(tree: Path, branches: Branches) -> None:
    ours, theirs = branches.start, branches.base_tip
    texts = _three(tree, ours, theirs, LOCK)
    git(tree, "merge", "--no-ff", "--no-commit", "--quiet", theirs, ok=(0, 1))  # 1: there are conflicts
    write_text(tree / PARAMS, branches.params)
    if any(texts):
        write_text(tree / LOCK, merge_lock(*texts))
    _keep_ours(tree, ours, str(layout.REPORTS))  # they are made again
    git(tree, "add", "--all", "--", *(path for path in (PARAMS, LOCK) if (tree / path).exists()))
    if left := git(tree, "diff", "--name-only", "--diff-filter=U").splitlines():
        git(tree, "reset", "--quiet", "--hard")
        raise _unmergeable(branches.base, branches.name, f"both changed {', '.join(left)}")
    record(tree, f"Merge {branches.base} into {branches.name}")


def _keep_ours(tree: Path, ours: str, folder: str) -> None:
    own = set(git(tree, "ls-tree", "-r", "--name-only", ours, "--", folder).splitlines())
    if own:
        git(tree, "checkout", "--quiet", ours, "--", *sorted(own))
    unmerged = set(git(tree, "diff", "--name-only", "--diff-filter=U", "--", folder).splitlines())
    if gone := sorted(unmerged - own):
        git(tree, "rm", "--quiet", "--force", "--", *gone)


def _three(folder: Path, ours: str, theirs: str, path: str) -> tuple[str, str, str]:
    """A file's text in the newest common ancestor, ours and theirs."""
    ancestor = git(folder, "merge-base", ours, theirs, ok=(0, 1)).partition("\n")[0]
    if not ancestor:
        raise StageError("they have no commit in common")
    return text_at(folder, ancestor, path), text_at(folder, ours, path), text_at(folder, theirs, path)


def _united(root: Path, settings: Retrain, start: str, base: str) -> str:
    try:
        return merge(*_three(root, start, base, PARAMS))
    except StageError as error:
        raise _unmergeable(settings.base, settings.branch, str(error)) from None


def _unmergeable(base: str, branch: str, why: str) -> StageError:
    return StageError(
        f"`{base}` cannot be merged into `{branch}`: {why}. Merge by hand (git switch {branch}; git merge {base}; "
        f"resolve; git commit; git switch -), then run this again"
    )
