"""Pretraining and fine-tuning killed again and again, in one process and in two: the end is the same to the byte.

Every run but the first is the recovery from the kill before it, and is killed further on: right before a checkpoint is
written or renamed, between outputs, and at moments that chance picks, most of them inside an epoch or a look at val.
The log (`pytest -s`) lists them, with the checkpoint that each left.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workspace import ROOT, Workspace

pytestmark = pytest.mark.slow
FAULTS = str(ROOT / "tests/faults")
RECIPE: dict[str, Any] = {
    "epochs": 3, "batch_size": 48, "lr": 0.02, "mixup": 0.2, "cutmix": 1.0, "erasing": 0.2, "augment": "trivial",
    "ema": 0.9, "dropout": 0.1, "stochastic_depth": 0.1, "clip_norm": 5.0, "accumulate": 2, "start_size": 24,
    "patience": 3, "monitor": "val_top1",
}  # fmt: skip
"""Everything that could have a state of its own."""
MOMENTS = {
    "pretrain": [
        "open .checkpoint.pt.tmp 1", "os.rename checkpoint.pt 1", "os.rename checkpoint.pt 2",
        "open .checkpoint.pt.tmp 3", "os.rename progress.jsonl 1", "os.rename checkpoint.pt 3",
        "os.rename pretrain/metrics.json 1", "os.rename models/backbone 1",
    ],
    "finetune": [
        "os.rename checkpoint.pt 1", "open .checkpoint.pt.tmp 2", "os.rename checkpoint.pt 3",
        "os.rename progress.jsonl 1", "os.rename models/finetuned 1", "open scratch/.checkpoint.pt.tmp 2",
        "os.rename scratch/checkpoint.pt 2", "os.rename models/scratch 1", "os.rename finetune/metrics.json 1",
    ],
}  # fmt: skip
BY_CHANCE = 7
"""Kills of all processes at once, of each stage."""
OUTPUTS = {"pretrain": ("models/backbone", "reports/pretrain"), "finetune": ("models/finetuned", "models/scratch")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A checkout with shards."""
    workspace = Workspace(tmp_path_factory.mktemp("prepared"), SYNSET_CHECKPOINT_STEPS="2", SYNSET_TRACKING="off")
    params = workspace.params
    params["model"]["image_size"] = 32
    params["pretrain"] |= RECIPE
    params["finetune"] |= RECIPE | {"strategy": "lora", "batch_size": 12}
    workspace.write_params(params)
    workspace.repro("shard")
    return workspace


def checkout(prepared: Workspace, folder: Path, world_size: int) -> Workspace:
    """A copy of it, for so many processes."""
    subprocess.run(["cp", "-a", prepared.root, folder], check=True)
    copy = object.__new__(Workspace)
    copy.root, copy.environment = folder, prepared.environment
    params = copy.params
    params["training"] |= {"world_size": world_size}
    copy.write_params(params)
    return copy


def stage(workspace: Workspace, name: str, fault: str = "", seconds: float | None = None) -> int:
    """Runs a stage, killed by a fault or as a whole group after some seconds; its exit code."""
    environment = workspace.environment | ({"PYTHONPATH": FAULTS, "SYNSET_FAULT": fault} if fault else {})
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}"], cwd=workspace.root, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if seconds is not None:
        time.sleep(seconds)
        kill_all(process.pid)
    _, said = process.communicate()
    assert fault or seconds is not None or not process.returncode, said
    assert not fault or "fault: kill" in said, said
    return process.returncode


def kill_all(leader: int) -> None:
    """SIGKILL for a process and all that descend from it: the launcher gives each worker a group of its own."""
    import psutil

    try:
        family = [*psutil.Process(leader).children(recursive=True), psutil.Process(leader)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family[:-1])


def place(workspace: Workspace, name: str) -> str:
    """Where the checkpoints of a stage are."""
    found = []
    for path in sorted((workspace.root / f".synset/work/{name}").rglob("checkpoint.pt")):
        state = torch.load(path, weights_only=True)
        found.append(f"{path.parent.name if name == 'finetune' else 'pretrain'} {state['epoch']}/{state['step']}")
    return ", ".join(found) or "no checkpoint"


def contents(workspace: Workspace, name: str) -> dict[str, bytes]:
    """All bytes of what a stage wrote."""
    paths = [path for out in OUTPUTS[name] for path in (workspace.root / out).rglob("*") if path.is_file()]
    return {str(path.relative_to(workspace.root)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_anywhere_the_end_is_the_same(prepared: Workspace, world_size: int, tmp_path: Path) -> None:
    undisturbed = checkout(prepared, tmp_path / "undisturbed", world_size)
    killed = checkout(prepared, tmp_path / "killed", world_size)
    chance = random.Random(world_size)
    for name in ("pretrain", "finetune"):
        began = time.perf_counter()
        stage(undisturbed, name)
        seconds = time.perf_counter() - began
        moments = [f"kill stages.{name} {moment}" for moment in MOMENTS[name]]
        for faults in ([""] * BY_CHANCE, moments):  # apart: those by chance may leave nothing to do for the others
            subprocess.run(["rm", "-rf", *(killed.root / out for out in OUTPUTS[name])], check=True)
            for number, fault in enumerate(faults, start=1):
                after = chance.uniform(0.4, 1.0) * seconds
                ended = stage(killed, name, fault) if fault else stage(killed, name, seconds=after)
                moment = fault.removeprefix("kill ") or f"stages.{name}, all after {after:.1f} s"
                print(f"{number:>2}  {moment}: ended with {ended}; {place(killed, name)}")
            stage(killed, name)
            assert not list((killed.root / ".synset/work" / name).iterdir())
            assert contents(killed, name) == contents(undisturbed, name)
            assert len(contents(killed, name)) >= 3
        assert not list((killed.root / "models").rglob(".*"))


def test_sigterm_writes_a_checkpoint_and_the_next_run_goes_on_from_that_step(
    prepared: Workspace, tmp_path: Path
) -> None:
    undisturbed, stopped = (checkout(prepared, tmp_path / name, 2) for name in ("undisturbed", "stopped"))
    stage(undisturbed, "pretrain")
    environment = stopped.environment | {"SYNSET_CHECKPOINT_STEPS": "1000"}
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.pretrain"], cwd=stopped.root, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    said = ""
    while "epoch 1 of 3" not in said:
        said += process.stderr.readline()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.stderr.read()
    assert place(stopped, "pretrain").startswith("pretrain ")
    stage(stopped, "pretrain")
    assert contents(stopped, "pretrain") == contents(undisturbed, "pretrain")
