"""The fingerprint of a stage: one hash over everything that decides what it writes; and the folder that it works in."""

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from stages.runtime.files import sha256
from stages.runtime.params_file import read_params


def fingerprint(stage: str, machine: str = "", source: str = "", without: Collection[str] = ()) -> str:
    """sha256 over the dependencies and parameters that dvc.yaml names for `stage`, and what else decides its bytes.

    Versions of packages are among the dependencies (stages/versions/). A shard set is known by its index.json, which
    holds the checksums of everything in it; raw tars, which may be 150 GB, by their names, sizes and times.

    Args:
        stage: as DVC names it: `pretrain`, `scan@target`.
        machine: kind of machine, where it decides bytes.
        source: listing of what is read from outside the graph (ingest).
        without: parameters that do not count, by dotted name.
    """
    params = read_params()
    declared = _declared(stage, params)
    parts: dict[str, Any] = {"stage": stage, "machine": machine, "source": source, "params": {}, "files": {}}
    for name in declared.get("params", []):
        value: Any = params
        for key in name.split("."):
            value = value[key]
        parts["params"][name] = _left(value, name, without)
    for dependency in declared.get("deps", []):
        for path in _files(Path(dependency)):
            parts["files"][path.as_posix()] = _state(path)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def work_folder(stage: str, of: str) -> Path:
    """Where a stage keeps its work in progress, by fingerprint."""
    return Path(".synset/work") / stage / of


def prune(stage_work: Path, keep: Path) -> None:
    """Removes work in progress of other configurations of a stage: nothing will ever ask for it again."""
    if stage_work.is_dir():
        for folder in stage_work.iterdir():
            if folder != keep:
                shutil.rmtree(folder)


def _left(value: Any, name: str, without: Collection[str]) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: each for key, each in value.items() if f"{name}.{key}" not in without}


def _declared(stage: str, params: dict[str, Any]) -> dict[str, Any]:
    """The stage of dvc.yaml; of a `foreach` stage with its key filled in."""
    name, _, key = stage.partition("@")
    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][name]
    if not key:
        return declared
    role = params["batches"][key]["role"]
    text = json.dumps(declared["do"]).replace("${key}", key).replace("${item.role}", role)
    return json.loads(text)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.as_posix().startswith("data/shards/"):
        return sorted(path.glob("[!.]*/index.json"))
    return sorted(file for file in path.rglob("*") if file.is_file())


def _state(path: Path) -> str | list[int]:
    if path.as_posix().startswith("data/raw/"):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
    return sha256(path)
