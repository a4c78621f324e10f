"""What depends on what: dvc.yaml names exactly what the code uses, and imports go downward only."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.closure import KINDS, ROOT, closure, code_deps, imports, locked, packages, sections

STAGES = ["ingest", "scan", "validate", "shard", "pretrain", "finetune", "evaluate", "register"]
COMMANDS = ["examine", "export", "label_queue", "predict"]
"""That compute, outside the graph."""
HEAVY = ["torch", "torchvision", "mlflow", "great_expectations", "nvidia.dali", "prefect"]
# Packages that decide no byte of an output: an upgrade reruns nothing.
WITHOUT_EFFECT = {"mlflow", "pydantic", "pyyaml", "tqdm", "psutil", "fsspec", "distributed"}

# Lower numbers know nothing of higher ones; of the same number, only those of the same group know each other.
LAYERS = {
    "stages.runtime.command": 0,
    "stages.runtime.files": 0,
    "stages.runtime.progress": 1,
    "stages.params": 1,
    "stages.runtime.fingerprint": 2,
    "stages.registry.tracking": 2,
    "stages.data": 2,
    "stages.training": 3,
    "stages.evaluation": 4,
    "stages": 5,
}


def declared(stage: str) -> dict[str, Any]:
    """The stage in dvc.yaml; of a group, what is done for each."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return dict(stages[stage].get("do", stages[stage]))


def modules(folder: str) -> list[str]:
    """Dotted names of all modules below a folder."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]


def source(module: str) -> str:
    """Its text."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def layer(module: str) -> str:
    """The longest entry of LAYERS that the module belongs to."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len)


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
def test_deps_are_exactly_the_files_that_the_module_uses(stage: str) -> None:
    code = sorted(dep for dep in declared(stage).get("deps", []) if dep.startswith("stages/"))
    # Raw data is made once: no edit of code ever reads a source again that may be gone.
    expected = [] if stage == "ingest" else code_deps(f"stages.{stage}")
    assert code == expected, f"python -m tests.closure stages.{stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_exactly_the_sections_that_the_module_loads(stage: str) -> None:
    assert {name.split(".")[0] for name in declared(stage).get("params", [])} == sections(f"stages.{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_of_every_package_it_is_decided_whether_its_version_is_a_dependency(stage: str) -> None:
    undecided = packages(f"stages.{stage}") - {name for kind in KINDS for name in locked(kind)} - WITHOUT_EFFECT
    assert not undecided, "put them into one of the *_PACKAGES (Makefile), or into WITHOUT_EFFECT here"


@pytest.mark.parametrize("module", modules("stages"))
def test_imports_go_downward_only(module: str) -> None:
    own = layer(module)
    for name in project_imports(module):
        assert name.startswith("stages."), f"{module} imports {name}"
        assert layer(name) == own or LAYERS[layer(name)] < LAYERS[own], (
            f"{module} imports {name}, which is not below it"
        )
        is_stage = name.removeprefix("stages.") in STAGES
        assert not is_stage, f"{module} imports the stage {name}: stages meet in files only"


@pytest.mark.parametrize("module", modules("pipelines"))
def test_flows_start_stages_as_processes(module: str) -> None:
    for name in project_imports(module):
        allowed = (
            "stages.params.",
            "stages.registry.tracking",
            "stages.runtime.command",
            "stages.runtime.files",
            "pipelines.",
        )
        assert name.startswith(allowed), f"{module} imports {name}"


def test_only_validation_pays_for_great_expectations() -> None:
    users = [stage for stage in STAGES if "great-expectations" in packages(f"stages.{stage}")]
    assert users == ["validate"]


def test_no_stage_knows_prefect() -> None:
    assert not [stage for stage in STAGES if "prefect" in packages(f"stages.{stage}")]


@pytest.mark.parametrize("stage", [*STAGES, *COMMANDS])
def test_help_is_instant(stage: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{stage}', '--help']\n"
        f"try: runpy.run_module('stages.{stage}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage:" in ended.stdout
    assert ended.stderr.split() == [], "imported for --help"


@pytest.mark.parametrize("module", [name for name in modules("pipelines") if "run(main)" in source(name)])
def test_help_is_help_and_starts_nothing(module: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, "--help"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("usage:")
    assert list(tmp_path.iterdir()) == []


def test_the_closure_follows_imports_in_functions_and_named_templates() -> None:
    register = {path.as_posix() for path in closure("stages.register")}
    assert {
        "stages/registry/served_model.py",
        "stages/registry/card/model_card.md.j2",
        "stages/runtime/params_file.py",
        "stages/registry/model_process.py",
    } <= register
    assert "stages/registry/tracking.py" not in register
