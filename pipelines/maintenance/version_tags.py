"""Git tags on what registered versions were made from: `dvc gc` goes by them, and git keeps their commits.

Each version of each model gets `model/<name>/<number>`.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import yaml

from pipelines.environment import ROOT
from pipelines.retrain.worktree import commit_of, text_at
from stages.registry import artifacts, versions
from stages.registry.client import tracking_uri
from stages.registry.versions import Version
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.git import IDENTITY, git, git_code

logger = logging.getLogger(__name__)

RECORDED = ("dvc.lock", "dvc.yaml", "params.yaml")
"""Files that a registration logged and that name the version's data; those in its commit may be older."""


def tag_versions(name: str, root: Path = ROOT) -> list[str]:
    """Tags what each registered version was made from; removes the tags of versions that are no longer registered.

    Args:
        name: of the model that params.yaml registers. Presets register others, whose data is in the same cache.

    Returns:
        the tags.

    Raises:
        StageError: a version's commit is not in this clone, or this is not the registry; nothing was changed.
    """
    models = versions.model_names()
    if not models and (root / layout.RECEIPT).exists():
        raise StageError(
            f"MLflow at {tracking_uri()} has no model, but this checkout has registered one "
            f"({layout.RECEIPT}), so which data to keep is unknown; nothing was removed. "
            f"Is MLFLOW_TRACKING_URI that of your registry?"
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
    """Whether a version of another model was made in this repository: other projects may share the registry."""
    return bool(version.sha256) and (not version.commit or bool(commit_of(root, version.commit)))


def _remove_tags(wanted: set[str], models: list[str], root: Path) -> None:
    """Removes tags that are not wanted; those of models unknown here stay, they may belong to another registry."""
    present = git(root, "for-each-ref", "--format=%(refname:strip=2)", "refs/tags/model/").splitlines()
    for tag in sorted(set(present) - wanted):
        if tag.split("/")[1] in models:
            git(root, "update-ref", "-d", f"refs/tags/{tag}")
        else:
            logger.warning("warning: this registry has no model of the tag %s; it stays until `git tag -d`", tag)


def _snapshot(version: Version, root: Path) -> str:
    """The version's commit if it names all data that the registration named; else a new commit after it that does.

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
    """A commit on top of `base` that replaces the text of some files; on no branch, the same one every time."""
    with tempfile.TemporaryDirectory() as temporary:
        index = {"GIT_INDEX_FILE": str(Path(temporary, "index"))}  # that of the checkout stays as it is
        dates = {f"GIT_{who}_DATE": git(root, "log", "-1", "--format=%cI", base) for who in ("AUTHOR", "COMMITTER")}
        git(root, "read-tree", base, env=index)
        for name, text in texts.items():
            blob = git_code(root, "hash-object", "-w", "--stdin", ok=(0,), text=text)[1]
            git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", env=index)
        tree = git(root, "write-tree", env=index)
        return git(root, "commit-tree", tree, "-p", base, "-m", message, env=IDENTITY | dates)
