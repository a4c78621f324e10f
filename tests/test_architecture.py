"""What depends on what: dvc.yaml names exactly what the code uses, and imports go downward only."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from tests import counts
from tests.closure import (
    KINDS,
    OBSERVERS,
    ROOT,
    closure,
    coverage,
    declared,
    declared_code,
    imports,
    locked,
    packages,
    sections,
)

STAGES = ["ingest", "scan", "validate", "shard", "pretrain", "finetune", "evaluate", "register"]
COMMANDS = ["examine", "export", "label_queue", "predict"]
"""That compute, outside the graph."""
HEAVY = ["torch", "torchvision", "mlflow", "great_expectations", "nvidia.dali", "prefect"]
# Packages that decide no byte of an output: an upgrade reruns nothing.
WITHOUT_EFFECT = {
    "distributed",
    "filelock",
    "fsspec",
    "mlflow",
    "pathspec",
    "psutil",
    "pydantic",
    "pyyaml",
    "ruamel-yaml",
}
WITHOUT_EFFECT |= {"requests", "sqlalchemy", "tqdm"}

LAYERS = ["runtime", "params", "pages", "data", "training", "evaluation", "registry"]
"""Folders of stages/, from the ground up: each may import itself and what is below it. Above them are the modules of
stages/, which nothing imports."""
FLOWS_MAY_IMPORT = ("stages.runtime.", "stages.params.", "stages.registry.", "pipelines.")
SURPLUS = {
    "scan": set(),
    "validate": set(),
    "shard": {"stages/data/raw/facts.py", "stages/runtime/tables.py"},
    "pretrain": {"stages/runtime/tables.py"},
    "finetune": {"stages/runtime/tables.py"},
}
"""By stage: code that a folder among its dependencies brings along and the stage does not use. A change of it runs the
stage once more for nothing. `evaluate` and `register` are not here: they train nothing, so they name whole folders."""


def modules(folder: str) -> list[str]:
    """Dotted names of all modules below a folder."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]


def source(module: str) -> str:
    """Its text."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def layer(module: str) -> int:
    """Its floor: the place of its folder in LAYERS, or the top for a module that runs."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 2 else len(LAYERS)


def project_imports(module: str) -> set[str]:
    """Modules of this project that a module imports."""
    names = imports(Path(*module.split(".")).with_suffix(".py"))
    return {name for name in names if name.split(".")[0] in ("stages", "pipelines", "tests", "bench")}


def test_the_graph_has_the_eight_stages_in_order() -> None:
    assert list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_run_by_the_module_of_its_name(stage: str) -> None:
    assert declared(stage)["cmd"].removesuffix(" ${key}") == f"python -m stages.{stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_deps_cover_exactly_the_code_that_the_module_uses(stage: str) -> None:
    if stage == "ingest":  # raw data is made once: no edit of code ever reads a source again that may be gone
        assert declared_code(stage) == []
        return
    found = coverage(f"stages.{stage}", declared_code(stage))
    how = f"python -m tests.closure stages.{stage}"
    assert not found.missing and not found.twice and not found.unused, how
    assert set(found.surplus) == SURPLUS.get(stage, set(found.surplus)), how


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_exactly_the_sections_that_the_module_loads(stage: str) -> None:
    assert {name.split(".")[0] for name in declared(stage).get("params", [])} == sections(f"stages.{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_of_every_package_it_is_decided_whether_its_version_is_a_dependency(stage: str) -> None:
    undecided = packages(f"stages.{stage}") - {name for kind in KINDS for name in locked(kind)} - WITHOUT_EFFECT
    assert not undecided, "put them into one of the *_PACKAGES (Makefile), or into WITHOUT_EFFECT here"


def test_imports_go_downward_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules("stages")
        for name in project_imports(module)
        if not name.startswith("stages.") or layer(name) > layer(module) or layer(name) == len(LAYERS)
    ]
    assert not wrong, "stages meet in files only, and a folder knows only itself and those below it"


def test_flows_start_stages_as_processes() -> None:
    pairs = [(module, name) for module in modules("pipelines") for name in project_imports(module)]
    assert not [f"{module} imports {name}" for module, name in pairs if not name.startswith(FLOWS_MAY_IMPORT)]


def test_what_only_observes_is_there_and_is_no_dependency() -> None:
    assert all((ROOT / path).is_file() for path in OBSERVERS)
    assert not OBSERVERS & {Path(dep) for stage in STAGES for dep in declared_code(stage)}


def test_dvc_does_not_see_what_decides_no_byte() -> None:
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        seen = [
            path
            for path in [
                "stages/runtime/README.md",
                "stages/runtime/__pycache__/files.cpython-311.pyc",
                *map(str, OBSERVERS),
            ]
            if not repo.dvcignore.is_ignored(repo.fs, str(ROOT / path))
        ]
        assert not repo.dvcignore.is_ignored(repo.fs, str(ROOT / "stages/runtime/files.py"))
    assert not seen


@pytest.mark.parametrize("name", counts.LIMITS)
def test_the_house_stays_easy_to_enter(name: str) -> None:
    assert counts.figures()[name] <= counts.LIMITS[name], "python -m tests.counts"


def test_only_validation_pays_for_great_expectations() -> None:
    users = [stage for stage in STAGES if "great-expectations" in packages(f"stages.{stage}")]
    assert users == ["validate"]


def test_no_stage_knows_prefect() -> None:
    assert not [stage for stage in STAGES if "prefect" in packages(f"stages.{stage}")]


HELP = """
import contextlib, io, json, runpy, sys
ended = {}
for module in sys.argv[1:]:
    sys.argv, before, printed = [module, "--help"], set(sys.modules), io.StringIO()
    with contextlib.redirect_stdout(printed):
        try: runpy.run_module(module, run_name="__main__")
        except SystemExit as end: code = end.code
    ended[module] = [code, printed.getvalue(), sorted(set(sys.modules) - before)]
print(json.dumps(ended))
"""
"""`--help` of one module after the other: by name the exit code, what was printed, and what was imported for it."""


def asked_for_help(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str, list[str]]]:
    """What HELP prints, in one process that starts in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HELP, *names]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout)


def test_help_is_instant(tmp_path: Path) -> None:
    for stage, (code, text, imported) in asked_for_help(
        tmp_path, [f"stages.{name}" for name in STAGES + COMMANDS]
    ).items():
        assert not code and text.startswith("usage:"), stage
        assert not set(HEAVY) & set(imported), f"{stage}: imported for --help"
    assert not list(tmp_path.iterdir())


def test_help_is_help_and_starts_nothing(tmp_path: Path) -> None:
    names = [name.removesuffix(".__main__") for name in modules("pipelines") if "run(main)" in source(name)]
    assert len(names) >= 10
    for module, (code, text, _) in asked_for_help(tmp_path, names).items():
        assert not code and text.startswith("usage:"), module
    assert not list(tmp_path.iterdir())


def test_the_closure_follows_imports_in_functions_and_named_templates() -> None:
    register = {path.as_posix() for path in closure("stages.register")}
    expected = {"stages/registry/served_model.py", "stages/registry/model_process.py", "stages/runtime/params_file.py"}
    assert expected <= register
    assert not {"stages/registry/runs.py", "stages/runtime/progress.py"} & register
