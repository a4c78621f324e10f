"""Several processes: the same training as one, exact resume, every image once, and one message for what is wrong."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from stages import ingest, pretrain, scan, shard, validate
from stages.runtime.command import StageError
from stages.runtime.files import write_json
from stages.runtime.fingerprint import work_folder
from stages.training.finetuning.finetuning import _drop_other_work
from stages.training.loop.checkpoints.work import _of_lineage
from stages.training.loop.launching import _first_failure
from tests.workspace import Workspace, written

PRETRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 32, "lr": 0.01, "warmup": 0.0, "seed": 1}


FAULTS = {"PYTHONPATH": str(Path(__file__).parents[2] / "faults")}
KILLED = FAULTS | {"SYNSET_FAULT": "kill stages.pretrain os.rename checkpoint.pt 3", "SYNSET_CHECKPOINT_STEPS": "2"}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A checkout with shards of a tiny sample."""
    workspace = Workspace(tmp_path_factory.mktemp("prepared"), SYNSET_TRACKING="off", OMP_WAIT_POLICY="PASSIVE")
    params = workspace.params
    for name in ("upstream", "target"):
        params["batches"][name]["source"] = f"sample:{name}?seed=5&images_per_class=12"
    params["validate"] |= {"max_quarantined": 0.5, "min_images_per_class": 1}
    params["pretrain"] |= PRETRAIN
    workspace.write_params(params)
    for name in ("upstream", "target"):
        workspace.call(ingest.main, name)
        workspace.call(scan.main, name)
    workspace.call(validate.main)
    workspace.call(shard.main, "upstream")
    return workspace


def set_recipe(workspace: Workspace, world_size: int, **recipe: Any) -> None:
    """Writes params.yaml for this many processes."""
    params = workspace.params
    params["training"] |= {"world_size": world_size}
    params["pretrain"] |= PRETRAIN | recipe
    workspace.write_params(params)


def result(workspace: Workspace) -> tuple[Weights, dict[str, Any]]:
    """Weights and report of the backbone."""
    report = json.loads((workspace.root / "reports/pretrain/metrics.json").read_text(encoding="utf-8"))
    return load_file(workspace.root / "models/backbone/model.safetensors"), report


def pretrained(workspace: Workspace, world_size: int, **recipe: Any) -> tuple[Weights, dict[str, Any]]:
    """What a training writes; one process is this one."""
    set_recipe(workspace, world_size, **recipe)
    if world_size == 1:
        workspace.call(pretrain.main)
    else:
        done = workspace.run(sys.executable, "-m", "stages.pretrain")
        assert done.returncode == 0, done.stdout
    return result(workspace)


@pytest.fixture(scope="module")
def of_three(prepared: Workspace) -> tuple[Weights, dict[str, Any]]:
    """What three processes write on a machine whose name resolves to nothing, where they must find each other too.

    Three, because the sum of two numbers is the same in any order.
    """
    set_recipe(prepared, 3, batch_size=16)
    done = prepared.run(sys.executable, "-m", "stages.pretrain", SYNSET_NAMELESS="yes", **FAULTS)
    assert done.returncode == 0, done.stdout
    return result(prepared)


def difference(one: Weights, other: Weights) -> float:
    """Of two networks' weights, relative to their size."""
    names = [name for name in one if one[name].is_floating_point() and "running" not in name]
    off = sum(float((one[name] - other[name]).square().sum()) for name in names)
    return (off / sum(float(one[name].square().sum()) for name in names)) ** 0.5


def test_several_processes_train_as_one_does(prepared: Workspace, of_three: tuple[Weights, dict[str, Any]]) -> None:
    """Where nothing looks at a batch as one: frozen norms see none, so gradients are the same but for rounding."""
    one, report = pretrained(prepared, 1, batch_size=16)
    three, report_of_three = of_three
    other_seed, _ = pretrained(prepared, 1, batch_size=16, seed=2)
    assert 0 < difference(one, three) < 0.5 * difference(one, other_seed)
    (epoch,), (epoch_of_three,) = report["epochs"], report_of_three["epochs"]
    assert epoch_of_three["train_loss"] == pytest.approx(epoch["train_loss"], rel=0.1)
    assert "inexact_world_sizes" not in report_of_three
    assert not list((prepared.root / ".synset/work/pretrain").iterdir())


def test_a_process_that_is_killed_stops_all_with_one_message_and_the_next_run_goes_on(
    prepared: Workspace, of_three: tuple[Weights, dict[str, Any]]
) -> None:
    set_recipe(prepared, 3, batch_size=16)
    killed = prepared.run(sys.executable, "-m", "stages.pretrain", **KILLED)
    assert killed.returncode == 1
    assert "error: process 0 was killed by SIGKILL; run again: training goes on" in killed.stdout
    assert "Traceback" not in killed.stdout and "ChildFailedError" not in killed.stdout
    done = prepared.run(sys.executable, "-m", "stages.pretrain", SYNSET_CHECKPOINT_STEPS="2")
    assert "going on after step" in done.stdout
    whole, (resumed, _) = of_three[0], result(prepared)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_nobody_outlives_a_launcher_that_is_killed(prepared: Workspace) -> None:
    """They would go on writing where the next run writes."""
    set_recipe(prepared, 2, epochs=1000)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "stages.pretrain"], cwd=prepared.root, stderr=subprocess.DEVNULL,
        env=prepared.environment | {"SYNSET_CHECKPOINT_STEPS": "1"},
    )  # fmt: skip
    written(prepared.root, f"{work_folder('pretrain', '*')}/checkpoint.pt", launcher)
    members = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    assert len(members) >= 2
    psutil.wait_procs(members)


@pytest.mark.slow
def test_another_number_of_processes_takes_over_only_if_asked_and_says_so(prepared: Workspace) -> None:
    pretrained(prepared, 2, epochs=2)
    assert prepared.run(sys.executable, "-m", "stages.pretrain", **KILLED).returncode == 1
    params = prepared.params
    params["training"] |= {"world_size": 1, "allow_inexact": True}
    prepared.write_params(params)
    done = prepared.run(sys.executable, "-m", "stages.pretrain")
    assert done.returncode == 0 and "going on after step 4 of epoch 1" in done.stdout, done.stdout
    assert "goes on from a checkpoint of another world size" in done.stdout
    report = json.loads((prepared.root / "reports/pretrain/metrics.json").read_text(encoding="utf-8"))
    assert report["inexact_world_sizes"] == [2, 1]
    params["training"]["allow_inexact"] = False
    prepared.write_params(params)


def test_a_process_that_alone_is_asked_to_stop_is_no_bug() -> None:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=128 + signal.SIGTERM, error_file="")
    found = _first_failure(ChildFailedError("stages.pretrain", {0: failure}))
    assert isinstance(found, StageError)
    assert str(found).startswith("process 0 was stopped by SIGTERM; run again")


def test_a_mistyped_parameter_does_not_cost_the_checkpoint_of_the_right_one(
    prepared: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = pretrained(prepared, 1, epochs=2)
    assert prepared.run(sys.executable, "-m", "stages.pretrain", **KILLED).returncode == -signal.SIGKILL
    set_recipe(prepared, 1, epochs=2, batch_size=5000)
    with pytest.raises(SystemExit, match="`batch_size` is 5000"):
        prepared.call(pretrain.main)
    with caplog.at_level(logging.INFO):
        resumed, _ = pretrained(prepared, 1, epochs=2)
    assert "going on after step" in caplog.text
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list((prepared.root / ".synset/work/pretrain").iterdir())


def test_a_folder_without_a_checkpoint_has_nothing_to_go_on_with(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_json(
            tmp_path / name / "lineage.json", {"lineage": "same" if name != "c" else "other", "world_sizes": [1]}
        )
    assert _of_lineage(tmp_path, "same") is None
    for name in ("b", "a", "c"):  # of finetune, below the model's name
        checkpoint = tmp_path / name / "finetuned/checkpoint.pt"
        checkpoint.parent.mkdir()
        checkpoint.touch()
        os.utime(checkpoint, ns=(0, 10 if name == "b" else 5))
    assert _of_lineage(tmp_path, "same") == tmp_path / "b", "the newest"


def test_a_trial_s_folder_keeps_no_work_of_another_recipe(tmp_path: Path) -> None:
    checkpoint = tmp_path / "finetuned/checkpoint.pt"
    for stamp, stays in (("a", False), ("a", True), ("b", False)):
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        _drop_other_work(tmp_path, stamp)
        assert checkpoint.exists() == stays


def test_what_is_wrong_is_said_once(prepared: Workspace) -> None:
    set_recipe(prepared, 2, batch_size=5000)
    done = prepared.run(sys.executable, "-m", "stages.pretrain")
    assert done.returncode == 1
    assert done.stdout.count("`batch_size` is 5000, but there are only") == 1, done.stdout
    assert "Traceback" not in done.stdout


def test_another_number_of_processes_than_the_params_say_is_refused(prepared: Workspace) -> None:
    set_recipe(prepared, 2)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "stages.pretrain")
    done = prepared.run(sys.executable, *launcher)
    assert done.returncode != 0
    assert "1 processes were started, but `training.world_size` in params.yaml is 2" in done.stdout


@pytest.mark.slow
def test_two_machines_meet(prepared: Workspace) -> None:
    """Two launchers on this one, as on two machines with a shared folder."""
    whole, _ = pretrained(prepared, 2)
    params = prepared.params
    params["training"] |= {"nodes": 2}
    prepared.write_params(params)
    alone = prepared.run(sys.executable, "-m", "stages.pretrain")
    assert "set SYNSET_RENDEZVOUS to host:port of the first machine" in alone.stdout
    environment = prepared.environment | {"SYNSET_RENDEZVOUS": f"localhost:{free_port()}"}
    machines = [
        subprocess.Popen([sys.executable, "-m", "stages.pretrain"], cwd=prepared.root, env=environment)
        for _ in range(2)
    ]
    assert [machine.wait() for machine in machines] == [0, 0]
    found = load_file(prepared.root / "models/backbone/model.safetensors")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
