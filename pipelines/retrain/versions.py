"""The registry's side of a retraining: finishes its version or removes it; tags the versions of a retracted batch.

Every write may be repeated, so a kill between two of them does no harm.
"""

import tempfile
from pathlib import Path

from pipelines.environment import ROOT
from pipelines.retrain.batch_list import batches
from pipelines.retrain.worktree import commit_of, text_at
from stages.registry import artifacts, versions
from stages.registry.client import reachable
from stages.registry.tags import CHALLENGER, IN_FORCE, PREVIOUS, RETRACTED
from stages.registry.versions import Version


def registered(name: str, model_sha256: str) -> Version | None:
    """The version with these weights."""
    with reachable():
        return versions.find_version(name, model_sha256)


def is_of(version: Version, commit: str) -> bool:
    """Whether a version was made by this retraining; one of an earlier training has another commit, or none."""
    return version.unfinished or version.commit == commit


def name_commit(version: Version, commit: str) -> None:
    """Finishes a version of this retraining; leaves any other as it is."""
    if is_of(version, commit):
        with reachable():
            versions.commit_version(version, commit)


def propose(version: Version, commit: str) -> None:
    """Gives a version of this retraining the alias `challenger`."""
    if is_of(version, commit):
        with reachable():
            versions.set_alias(version, CHALLENGER)


def remove_unfinished(name: str) -> list[Version]:
    """Removes the versions whose retraining will never commit; returns them."""
    with reachable():
        left = [version for version in versions.list_versions(name) if version.unfinished]
        for version in left:
            versions.delete_version(version)
    return left


def drop(version: Version, commit: str) -> None:
    """Removes the version of a commit that is dropped, unless somebody has promoted it."""
    if is_of(version, commit) and not set(version.aliases) & {*IN_FORCE, PREVIOUS}:
        with reachable():
            versions.delete_version(version)


def mark_retracted(name: str, batch: str) -> list[Version]:
    """Tags every version that was trained on the batch; none of them stays `challenger`.

    Returns:
        These versions, newest first.
    """
    with reachable():
        found = [version for version in versions.list_versions(name) if batch in _batches(version)]
        for version in found:
            earlier = [each for each in version.tags.get(RETRACTED, "").split(", ") if each and each != batch]
            versions.set_tags(version, {RETRACTED: ", ".join([*earlier, batch])})
            if CHALLENGER in version.aliases:
                versions.delete_alias(name, CHALLENGER)
    return found


def _batches(version: Version, root: Path = ROOT) -> list[str]:
    """The batches that a version was trained on, by params.yaml of its run, or of its commit if the run is gone."""
    with tempfile.TemporaryDirectory() as folder:
        path = artifacts.download(version.run_id, "params.yaml", Path(folder))
        text = path.read_text(encoding="utf-8") if path else ""
    if not text and version.commit:
        text = text_at(root, commit_of(root, version.commit), "params.yaml")
    return list(batches(text))
