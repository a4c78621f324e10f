"""Runs git: without this machine's hooks, without background work, and with git's own words in errors."""

import os
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from stages.runtime.command import StageError

_OPTIONS = [
    *("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgsign=false"),
    *("-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "merge.conflictStyle=merge"),
]
# git sets these for its hooks: a flow that a hook starts must not work in the index of that hook's repository.
_SET_FOR_HOOKS = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}

IDENTITY = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "Synset"), ("EMAIL", "synset@localhost"))
}
"""Environment of a commit on a machine where git does not know its user."""


class GitError(StageError):
    """git failed; the message has git's own words."""


def git(folder: Path, *arguments: str, ok: Collection[int] = (0,), env: Mapping[str, str] | None = None) -> str:
    """What `git` prints in `folder`, the root of a checkout, without the last line end.

    Args:
        ok: exit codes that are no error.
        env: added to this process's environment.

    Raises:
        GitError: another exit code, no git, or no such folder.
    """
    return git_code(folder, *arguments, ok=ok, env=env)[1]


def git_code(
    folder: Path,
    *arguments: str,
    ok: Collection[int] = (0, 1),
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    parents: bool = False,
) -> tuple[int, str]:
    """Exit code of `git`, and what it prints.

    Args:
        ok: exit codes that are no error.
        env: added to this process's environment.
        text: its standard input.
        parents: `folder` may lie inside a repository; by default git must not climb to one above it.

    Raises:
        GitError: another exit code, no git, or no such folder.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _SET_FOR_HOOKS}
    environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
    if not parents:
        environment["GIT_CEILING_DIRECTORIES"] = str(folder.absolute().parent)
    try:
        done = subprocess.run(
            ["git", *_OPTIONS, *arguments],
            cwd=folder,
            env=environment | dict(env or {}),
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except (FileNotFoundError, NotADirectoryError):
        raise GitError(f"git is not installed, or there is no folder {folder}") from None
    if done.returncode not in ok:
        words = " ".join((done.stderr or done.stdout).split())
        raise GitError(f"`git {arguments[0]}` failed in {folder}: {words or f'exit code {done.returncode}'}")
    return done.returncode, done.stdout.rstrip("\n")
