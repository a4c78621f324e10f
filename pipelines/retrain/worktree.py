"""A git worktree for a flow, so that nobody's checkout is touched; it shares the checkout's DVC cache.

A flow works in it only while it holds its flow lock, so every lock file found there was left by a killed process.
"""

import shutil
import time
from pathlib import Path

from dvc.config import Config, merge

from stages.runtime.command import StageError
from stages.runtime.git import IDENTITY, GitError, git, git_code

_FOREIGN_LOCK = 3.0
"""Seconds after which a lock in the repository, which other processes use too, counts as left by a kill."""


def check_root(folder: Path) -> None:
    """Raises StageError unless `folder` is the root of a git checkout with a commit."""
    try:
        git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
        root = Path(git(folder, "rev-parse", "--show-toplevel"))
    except GitError:
        raise StageError(f"{folder} is not the root of a git repository with a commit; run this from there") from None
    if root.resolve() != folder.resolve():
        raise StageError(f"{folder} lies inside the git repository {root}; run this from its root")


def commit_of(folder: Path, name: str) -> str:
    """The commit that a branch, tag or other name stands for; empty where there is no such name."""
    return git(folder, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", ok=(0, 1))


def contains(folder: Path, commit: str, earlier: str) -> bool:
    """Whether `earlier` is `commit` or one of its ancestors."""
    return git_code(folder, "merge-base", "--is-ancestor", earlier, commit)[0] == 0


def text_at(folder: Path, commit: str, path: str) -> str:
    """A file's text as of a commit; empty where the commit has no such file."""
    if not commit or not git(folder, "ls-tree", "--name-only", commit, "--", path):
        return ""
    return git(folder, "show", f"{commit}:{path}") + "\n"


def trailer(folder: Path, commit: str, key: str) -> str:
    """The value of a trailer (`Key: value`) of a commit's message; empty where it has none."""
    return git(folder, "log", "-1", f"--format=%(trailers:key={key},valueonly)", commit).strip()


def checked_out(folder: Path, branch: str, besides: Path) -> Path | None:
    """The worktree, other than `besides`, that has the branch checked out."""
    for entry in git(folder, "worktree", "list", "--porcelain").split("\n\n"):
        lines = dict(line.partition(" ")[::2] for line in entry.splitlines())
        where = Path(lines.get("worktree", ""))
        if lines.get("branch") == f"refs/heads/{branch}" and where.resolve() != besides.resolve() and where.is_dir():
            return where
    return None


def open_tree(root: Path, tree: Path, commit: str) -> None:
    """The worktree `tree` of the checkout `root` at `commit`, with a detached HEAD and nothing changed.

    Files that git ignores stay: an interrupted run made them. A damaged tree is made again.
    """
    clear_locks(tree)
    if not is_tree(root, tree):
        shutil.rmtree(tree, ignore_errors=True)
        tree.parent.mkdir(parents=True, exist_ok=True)
        # Twice --force: also where one is registered at this place, and locked by a `git worktree add` that was killed.
        git(root, "worktree", "add", "--quiet", "--force", "--force", "--detach", str(tree), commit)
    git(tree, "checkout", "--quiet", "--force", "--detach", commit)
    git(tree, "reset", "--quiet", "--hard", commit)
    git(tree, "clean", "--quiet", "-ffd")
    connect(root, tree)


def is_tree(root: Path, tree: Path) -> bool:
    """Whether `tree` is a sound worktree of `root`'s repository."""
    if not (tree / ".git").is_file():
        return False
    try:
        if not commit_of(tree, "HEAD"):
            return False
        common = [Path(git(each, "rev-parse", "--path-format=absolute", "--git-common-dir")) for each in (root, tree)]
        return common[0].resolve() == common[1].resolve()
    except GitError:
        return False


def clear_locks(tree: Path) -> None:
    """Removes the locks of git and DVC that a killed process left in `tree`."""
    for lock in ("lock", "rwlock", "rwlock.lock"):
        (tree / ".dvc/tmp" / lock).unlink(missing_ok=True)
    if not (tree / ".git").is_file():
        return
    try:
        folder = Path(git(tree, "rev-parse", "--absolute-git-dir"))
    except GitError:
        return  # open_tree makes it again
    for path in folder.glob("*.lock"):
        path.unlink(missing_ok=True)


def connect(root: Path, tree: Path) -> None:
    """Gives DVC in `tree` the cache and the remotes of `root`, with its local settings and credentials."""
    own = _dvc_config(root)
    with _dvc_config(tree).edit("local", validate=False) as settings:
        settings.clear()
        merge(settings, {"remote": own.load_one("repo")["remote"]})
        merge(settings, own.load_one("local"))
        merge(settings, {"cache": {"dir": str(cache_folder(root))}})
    (tree / ".dvc/config.local").chmod(0o600)  # it may hold credentials


def cache_folder(root: Path) -> Path:
    """The DVC cache of the checkout: what `dvc cache dir` prints."""
    return Path(_dvc_config(root)["cache"].get("dir") or root / ".dvc/cache")


def default_remote(root: Path) -> str:
    """The name of the default DVC remote that the checkout itself names; empty where it names none.

    A remote in a user's own settings is no wish of this project to push there.
    """
    own = _dvc_config(root)
    named = [own.load_one(level).get("core", {}).get("remote") for level in ("local", "repo")]
    return str(next(filter(None, named), ""))


def _dvc_config(checkout: Path) -> Config:
    return Config(str(checkout / ".dvc"), validate=False)  # `dvc` itself does that, and says more about it


def commit_all(tree: Path, paths: list[str], message: str) -> str:
    """Commits all changes in `paths`, except ignored files, even if there are none; returns the commit."""
    there = [path for path in paths if (tree / path).exists() or git(tree, "ls-files", "--", path)]
    git(tree, "add", "--all", "--", *there)
    return record(tree, message, "--allow-empty")


def record(tree: Path, message: str, *arguments: str) -> str:
    """`git commit`, under our own name where git knows no user; returns the commit."""
    known = git_code(tree, "var", "GIT_COMMITTER_IDENT", ok=(0, 1, 128))[0] == 0
    options = ["--quiet", "--no-verify", "--cleanup=verbatim", "-m", message]
    git(tree, "commit", *options, *arguments, env={} if known else IDENTITY)
    return commit_of(tree, "HEAD")


def move_branch(root: Path, branch: str, commit: str, before: str) -> None:
    """Moves the branch to `commit`, in one atomic write, if it still is at `before` (empty: does not exist yet).

    Raises:
        GitError: it does not.
    """
    _wait_for_lock(root, branch)
    why = f"retrain: {commit[:12]}"
    git(root, "update-ref", "-m", why, f"refs/heads/{branch}", commit, before or "0" * 40)


def _wait_for_lock(root: Path, branch: str) -> None:
    """Waits for the lock on a branch, which lives milliseconds, then removes it: it was left by a kill."""
    common = git(root, "rev-parse", "--path-format=absolute", "--git-common-dir")
    lock = Path(common, "refs/heads", f"{branch}.lock")
    until = time.monotonic() + _FOREIGN_LOCK
    while lock.exists() and time.monotonic() < until:
        time.sleep(0.1)
    lock.unlink(missing_ok=True)
