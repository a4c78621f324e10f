"""The fingerprint of a stage: one hash over everything that decides what it writes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from stages.files import sha256
from stages.params.load import read_params


def fingerprint(stage: str, machine: str) -> str:
    """sha256 over the dependencies and parameters that dvc.yaml names for `stage`, and the kind of machine.

    Versions of packages are among the dependencies (stages/versions/). A shard set is known by its index.json, which
    holds the checksums of everything in it.
    """
    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
    parts: dict[str, Any] = {"machine": machine, "params": {}, "files": {}}
    params = read_params()
    for name in declared.get("params", []):
        value: Any = params
        for key in name.split("."):
            value = value[key]
        parts["params"][name] = value
    for dependency in declared["deps"]:
        for path in _files(Path(dependency)):
            parts["files"][path.as_posix()] = sha256(path)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def work_folder(stage: str, of: str) -> Path:
    """Where a stage keeps its work in progress, by fingerprint."""
    return Path(".synset/work") / stage / of


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.as_posix().startswith("data/shards/"):
        return sorted(path.glob("[!.]*/index.json"))
    return sorted(file for file in path.rglob("*") if file.is_file())
