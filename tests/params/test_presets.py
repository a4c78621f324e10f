"""Every preset is a complete params.yaml, and says how to run it and what to expect."""

from pathlib import Path

import pytest

from bench.robustness import without_attacks
from stages.params.all import check_all
from stages.params.finetune import Finetune
from stages.runtime.params_file import check, read_params
from tests.workspace import ROOT

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_complete(path: Path) -> None:
    check_all(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_it_is(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("command", "expected", "time", "hardware"):
        assert any(line.startswith(f"#   {word} ") for line in header), word
    assert f"cp presets/{path.name} params.yaml && make repro" in "\n".join(header)


def test_the_adversarial_preset_can_be_held_against_itself_without_attacks() -> None:
    params = without_attacks(read_params(ROOT / "presets/imagenette-64px-adversarial.yaml"))
    assert check("finetune", params["finetune"], Finetune).adversarial is None


def test_there_are_presets() -> None:
    assert PRESETS
