"""A registered version derived again from its commit in a worktree, and compared with what the registry holds.

The worktree has the packages of the commit's lock. Raw data comes from DVC's cache or remote; every later stage is run
anew, no cache is used and none written.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipelines.environment import ROOT, settings
from pipelines.processes.flow_lock import folder
from pipelines.processes.flow_run import stage_names
from pipelines.retrain.worktree import commit_of, default_remote, open_tree, text_at
from stages.registry import artifacts, versions
from stages.registry.runs import flatten
from stages.registry.tags import DIRTY, MACHINE, SERVING, VERIFY, VERIFY_DETAIL
from stages.registry.versions import Version
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import sha256
from stages.runtime.git import git

NAME = "verify"
REPRODUCED, DIFFERS, NOT_COMPARABLE = "reproduced", "differs", "not comparable"
WEIGHTS = layout.FINETUNED / layout.WEIGHTS
LOCK = "requirements.lock"
_OTHERS = ("PYTHONPATH", "SYNSET_PARAMS", "SYNSET_UNFINISHED", "MLFLOW_TRACKING_URI", "VIRTUAL_ENV")
"""Variables of this environment that would lead the stages away from the commit."""
# Run by the Python that made the weights, in its checkout: prints what decides bits besides what git and DVC name.
_MACHINE = """
import json
from importlib.metadata import version
from pathlib import Path
try:
    from stages.params.training.training import Training
    from stages.runtime.params_file import load_section
    from stages.training.networks.devices import set_up
except ModuleNotFoundError:  # the commit is older than these folders
    from stages.params.load import load_section
    from stages.params.training import Training
    from stages.training.devices import set_up
lines = {line for path in Path("stages/versions").glob("*.txt") for line in path.read_text().split()}
others = sorted(line for line in lines if version(line.split("==")[0]) != line.split("==")[1])
print(json.dumps([set_up(load_section("training", Training)).kind, others]))
"""


Command = Callable[..., list[str]]
"""Runs a command (`cwd`, `env`), its output in the log; returns its lines. Raises StageError where it fails."""


@dataclass(frozen=True)
class Finding:
    """The result of deriving a version again."""

    result: str
    detail: str


def choose(name: str, number: int | None, root: Path = ROOT) -> Version:
    """The version to verify.

    Raises:
        StageError: there is none, or its commit alone does not reproduce it.
    """
    found = versions.list_versions(name)
    if number is None:
        wanted = [*(version for version in found if SERVING in version.aliases), *found]
    else:
        wanted = [version for version in found if version.number == number]
    if not wanted:
        listed = ", ".join(str(version.number) for version in found) or "none"
        raise StageError(f"{name} has no {'version' if number is None else f'version {number}'} (it has: {listed})")
    version = wanted[0]
    what = f"{name} version {version.number} cannot be verified"
    if version.unfinished:
        raise StageError(f"{what}: retraining has not committed it yet")
    if not version.commit or not version.sha256:
        raise StageError(f"{what}: it names no commit. A version does that was registered in a git checkout")
    if DIRTY in version.tags:
        raise StageError(
            f"{what}: it was made with uncommitted changes (git.dirty), so its commit {version.commit[:12]} does not "
            f"give it again. Commit before `make repro`, and the next version can be"
        )
    if not commit_of(root, version.commit):
        raise StageError(f"{what}: this clone has no commit {version.commit}; `git fetch --all` where it was pushed")
    return version


def record(version: Version, finding: Finding) -> None:
    """Tags the version with result, date and detail."""
    today = datetime.now(UTC).date().isoformat()
    versions.set_tags(version, {VERIFY: f"{finding.result} {today}", VERIFY_DETAIL: finding.detail})


def derive(version: Version, command: Command) -> Finding:
    """Derives the version again and compares.

    Raises:
        StageError: it cannot be done: data is gone, packages cannot be installed, or a stage fails.
    """
    if (held := _weights_in_registry(version)) != version.sha256:
        registered = f"sha256 {held}, by its tag {version.sha256}"
        return Finding(DIFFERS, f"what the registry holds is not what was registered: its weights have {registered}")
    tree = folder(NAME) / "tree"
    shutil.rmtree(tree, ignore_errors=True)  # nothing of an earlier run may help
    open_tree(ROOT, tree, version.commit)
    with tempfile.TemporaryDirectory() as temporary:
        recorded = _recorded(version, Path(temporary))
        if "dvc.lock" in recorded:
            # The version's own: `git.commit` is that of the code, and dvc.lock was often committed after it.
            shutil.copyfile(recorded["dvc.lock"], tree / layout.DVC_LOCK)
        python = _python(tree, version.commit, command)
        env = _environment(tree, python)
        _raw_data(tree, python, env, command)
        for stage in stage_names(tree / layout.DVC_YAML):
            if stage not in ("ingest", "register"):
                only = ["--single-item", "--force", "--no-run-cache", "--no-commit"]
                command([python, "-m", "dvc", "repro", *only, stage], cwd=tree, env=env)
        finding = _compared(version, tree, recorded, partial(command, [python, "-c", _MACHINE], cwd=tree, env=env))
    if finding.result == REPRODUCED:
        git(ROOT, "worktree", "remove", "--force", "--force", str(tree))
        return finding
    return Finding(finding.result, f"{finding.detail}; what was made lies under .synset/{NAME}/tree")


def _weights_in_registry(version: Version) -> str:
    """sha256 of the weights that would be served. They are not loaded: that would only test today's packages."""
    with tempfile.TemporaryDirectory() as temporary:
        artifacts.download_model(version, Path(temporary))
        found = artifacts.weights_sha256(Path(temporary))
    if not found:
        raise StageError(f"version {version.number} cannot be verified: the registry holds no weights of it")
    return found


def _recorded(version: Version, into: Path) -> dict[str, Path]:
    """Files that its registration logged, as far as they are still there."""
    found = {name: artifacts.download(version.run_id, name, into) for name in ("dvc.lock", layout.METRICS.as_posix())}
    return {name: path for name, path in found.items() if path}


def _python(tree: Path, commit: str, command: Command) -> str:
    """A Python with the packages that the commit locks: this one, or one set up by the commit's own Makefile."""
    locked = text_at(ROOT, commit, LOCK)
    if not locked:
        raise StageError(f"its commit {commit[:12]} has no {LOCK}, so which packages it was made with is unknown")
    if locked == (ROOT / LOCK).read_text(encoding="utf-8"):
        return sys.executable
    own = ROOT / ".synset/uv/bin/uv"
    # With the Python that runs here: the Makefile would take the newest on PATH, which may be another or none.
    chosen = [f"PYTHON={sys.executable}", *([f"UV={own}"] if own.exists() else [])]
    command(["make", "setup", *chosen], cwd=tree, env=_environment(tree, None))
    python = tree / ".venv/bin/python"
    if not python.exists():
        raise StageError(f"`make setup` of its commit {commit[:12]} made no {python.relative_to(tree)}")
    return str(python)


def _environment(tree: Path, python: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OTHERS}
    first = [str(Path(python).parent)] if python else []
    path = os.pathsep.join([*first, os.environ.get("PATH", os.defpath)])
    return kept | settings(tree) | {"SYNSET_TRACKING": "off", "PATH": path}


def _raw_data(tree: Path, python: str, env: Mapping[str, str], command: Command) -> None:
    """Checks raw data out of DVC's cache, or pulls it; sources are never read again. Raises StageError."""
    lock = tree / layout.DVC_LOCK
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}
    wanted = [name for name in stages if name.split("@")[0] == "ingest"]
    if not wanted:
        raise StageError("neither the version nor its commit has a dvc.lock that says which raw data it was made from")
    try:
        command([python, "-m", "dvc", "checkout", *wanted], cwd=tree, env=env)
    except StageError as error:
        if not default_remote(ROOT):
            raise StageError(
                f"its raw data is not in DVC's cache, and there is no remote to pull it from: {error}"
            ) from error
        command([python, "-m", "dvc", "pull", *wanted], cwd=tree, env=env)


# --------------------------------------------------------------------------------------------------------- comparison


def _compared(version: Version, tree: Path, recorded: Mapping[str, Path], machine: Callable[[], list[str]]) -> Finding:
    differences = []
    if (made := sha256(tree / WEIGHTS)) != version.sha256:
        differences.append(f"weights {made[:12]} instead of {version.sha256[:12]}")
    before = recorded.get(layout.METRICS.as_posix())
    if before and (figures := different_figures(_json(before), _json(tree / layout.METRICS))):
        differences.append(f"figures {', '.join(figures[:5])}{', ...' if len(figures) > 5 else ''}")
    if not differences:
        figures_too = "the same weights and figures" if before else "the same weights; no figures are recorded"
        return Finding(REPRODUCED, f"{figures_too}, from commit {version.commit[:12]}")
    found = "; ".join(differences)
    kind, others = json.loads(machine()[-1])
    if others:
        return Finding(NOT_COMPARABLE, f"{found}; installed here are other versions than {', '.join(others)}")
    if (then := version.tags.get(MACHINE, "")) != kind:
        return Finding(NOT_COMPARABLE, f"{found}; it was trained on {then or 'an unknown machine'}, this is {kind}")
    return Finding(DIFFERS, f"{found}, on the same kind of machine ({kind})")


def different_figures(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted names of the figures that differ; `null` counts as a value."""
    one, other = flatten(before), flatten(now)
    missing = object()
    return sorted(name for name in one.keys() | other.keys() if one.get(name, missing) != other.get(name, missing))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
