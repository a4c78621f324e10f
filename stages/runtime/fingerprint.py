"""The fingerprint of a stage: one hash over all that decides what it writes; and where its unfinished work lies.

dvc.yaml says what that is: dependencies and parameters. A dependency may be a folder of code; files in it that
.dvcignore names do not count, for DVC and here.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pathspec import GitIgnoreSpec

from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import sha256
from stages.runtime.params_file import read_params


def fingerprint(stage: str, machine: str = "", source: str = "", without: Collection[str] = ()) -> str:
    """sha256 over the dependencies and parameters that dvc.yaml names for `stage`, and what else decides its bytes.

    Versions of packages are among the dependencies (stages/versions/). A shard set counts by its index.json, which
    holds the checksums of everything in it; raw tars, which may be 150 GB, by their names, sizes and times.

    Args:
        stage: as DVC names it: `pretrain`, `scan@target`.
        machine: kind of machine, where it decides bytes.
        source: listing of what is read from outside the graph (ingest).
        without: parameters that do not count, by dotted name.

    Raises:
        StageError: dvc.yaml has no such stage, or names a path or parameter that does not exist.
    """
    params = read_params()
    declared = _declared(stage, params)
    parts: dict[str, Any] = {"stage": stage, "machine": machine, "source": source, "params": {}, "files": {}}
    for name in declared.get("params", []):
        parts["params"][name] = _left(_param(name, params, stage), name, without)
    for path in _dependencies(stage, declared):
        parts["files"][path.as_posix()] = _state(path)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def dependencies_of(stage: str) -> list[Path]:
    """The files that dvc.yaml names as dependencies of `stage`; of shard sets only their index.json.

    Raises:
        StageError: dvc.yaml has no such stage, or names a path that does not exist.
    """
    return _dependencies(stage, _declared(stage, read_params()))


def work_folder(stage: str, of: str) -> Path:
    """Where a stage keeps its work in progress, by fingerprint."""
    return layout.work(stage) / of


def prune(stage_work: Path, keep: Path) -> None:
    """Removes work in progress of other configurations of a stage: nothing will ever ask for it again."""
    if stage_work.is_dir():
        for folder in stage_work.iterdir():
            if folder != keep:
                shutil.rmtree(folder)


def _declared(stage: str, params: dict[str, Any]) -> dict[str, Any]:
    """The stage of dvc.yaml; of a `foreach` stage with `${key}`, `${item...}` and `${param}` filled in."""
    name, _, key = stage.partition("@")
    stages = yaml.safe_load(layout.DVC_YAML.read_text(encoding="utf-8"))["stages"]
    if name not in stages:
        raise StageError(f"{layout.DVC_YAML} has no stage `{name}`")
    if not key:
        return dict(stages[name])
    items = _param(stages[name]["foreach"].strip("${ }"), params, stage)
    values = params | {"key": key, "item": _param(key, items, stage)}
    text = re.sub(r"\$\{(.*?)\}", lambda found: str(_param(found[1], values, stage)), json.dumps(stages[name]["do"]))
    return dict(json.loads(text))


def _param(name: str, values: Any, stage: str) -> Any:
    """A value by its dotted name."""
    for key in name.split("."):
        if not isinstance(values, dict) or key not in values:
            raise StageError(f"{layout.DVC_YAML}: `{name}` of the stage `{stage}` is not in {layout.PARAMS}")
        values = values[key]
    return values


def _left(value: Any, name: str, without: Collection[str]) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: each for key, each in value.items() if f"{name}.{key}" not in without}


def _dependencies(stage: str, declared: dict[str, Any]) -> list[Path]:
    ignored = _ignored()
    found: list[Path] = []
    for path in map(Path, declared.get("deps", [])):
        files = [file for file in _files(path) if not ignored.match_file(file)]
        # data/shards/<role> may hold no shard set yet; no other folder is empty. DVC itself refuses an ignored file.
        if not files and not path.is_file() and not (path.is_relative_to(layout.SHARDS) and path.is_dir()):
            raise StageError(
                f"{layout.DVC_YAML}: the stage `{stage}` depends on {path}, which is missing; `dvc repro` makes what "
                f"stages before it write"
            )
        found += files
    return found


def _ignored() -> GitIgnoreSpec:
    """The patterns of .dvcignore; DVC too reads them with pathspec."""
    path = Path(".dvcignore")
    return GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_relative_to(layout.SHARDS):
        return sorted(path.glob("[!.]*/index.json"))  # dot: half-made
    return sorted(file for file in path.rglob("*") if file.is_file())


def _state(path: Path) -> str | list[int]:
    if path.is_relative_to(layout.RAW):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
    return sha256(path)
