"""The whole pipeline on a small sample, by `dvc repro`, and what must always hold of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.workspace import Workspace

ALL = [
    "ingest@upstream", "ingest@target", "scan@upstream", "scan@target", "validate", "shard@upstream", "shard@target",
    "pretrain", "finetune", "evaluate", "register",
]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A checkout in which everything ran once."""
    workspace = Workspace(tmp_path_factory.mktemp("done"))
    assert sorted(workspace.repro()) == sorted(ALL)
    return workspace


def test_a_second_repro_runs_nothing(done: Workspace) -> None:
    assert done.repro() == []


def test_another_checkout_without_tracking_and_with_one_worker_writes_the_same_bytes(
    done: Workspace, tmp_path: Path
) -> None:
    other = Workspace(tmp_path, SYNSET_TRACKING="off", SYNSET_WORKERS="1")
    other.repro("evaluate")
    theirs = done.outputs()
    del theirs["models/registered.json"]
    assert other.outputs() == theirs
    assert not (tmp_path / "mlflow.db").exists()


def test_every_accepted_test_image_is_scored_once(done: Workspace) -> None:
    accepted = pd.read_parquet(done.root / "data/accepted/finetune/target.parquet")
    predictions = pd.read_parquet(done.root / "reports/predictions.parquet")
    expected = accepted.loc[accepted["split"] == "test", "key"]
    assert len(expected) > 0
    assert sorted(predictions.loc[predictions["split"] == "test", "key"]) == sorted(expected)


def test_metrics_are_those_of_the_predictions(done: Workspace) -> None:
    predictions = pd.read_parquet(done.root / "reports/predictions.parquet").query("split == 'test'")
    hits = np.stack(predictions["logits"].to_list()).argmax(1) == predictions["label"].to_numpy()
    metrics = json.loads((done.root / "reports/metrics.json").read_text(encoding="utf-8"))
    assert metrics["test"]["top1"] == pytest.approx(hits.mean(), abs=1e-6)


def test_nothing_is_written_outside_the_named_places(done: Workspace) -> None:
    tracked = set(done.run("git", "ls-files").stdout.splitlines())
    top = {path.name for path in done.root.iterdir()} - {name.split("/")[0] for name in tracked}
    assert top <= {".venv", ".git", "dvc.lock", "models", "reports", ".synset", "mlflow.db", "mlartifacts"}


def test_a_new_key_of_evaluate_reruns_evaluate_and_register_only(done: Workspace) -> None:
    params = done.params
    done.write_params(params | {"evaluate": params["evaluate"] | {"calibration_bins": 7}})
    ran = done.repro()
    done.write_params(params)
    assert ran == ["evaluate", "register"]
    assert done.repro("evaluate") in (["evaluate"], [])


def test_a_new_finetune_batch_leaves_older_data_alone(done: Workspace) -> None:
    params = done.params
    shards = {path: md5 for path, md5 in done.outputs().items() if path.startswith("data/shards/")}
    later = {"role": "finetune", "source": "sample:target?seed=6&images_per_class=20"}
    done.write_params(params | {"batches": params["batches"] | {"later": later}})
    ran = done.repro("pretrain", "shard")
    assert ran == ["ingest@later", "scan@later", "validate", "shard@later"]
    assert shards.items() <= done.outputs().items()
    accepted = pd.read_parquet(done.root / "data/accepted/finetune/later.parquet")
    assert set(accepted["split"]) == {"train", "val", "fresh"}

    # Gone from the list, gone from the disk: it must not join the next training.
    done.write_params(params)
    assert done.repro("pretrain", "shard") in (["validate"], [])
    done.repro("evaluate")
    assert not (done.root / "data/shards/finetune/later").exists()


def test_a_fresh_clone_with_the_cache_registers_again_and_runs_nothing_else(done: Workspace, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(done.root, clone, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts", "models", ".synset"))
    other = Workspace.__new__(Workspace)
    other.root = clone
    other.environment = {name: value.replace(str(done.root), str(clone)) for name, value in done.environment.items()}
    assert other.run("dvc", "checkout").returncode in (0, 1)  # the receipt is not in the cache
    assert other.repro() == ["register"]
    receipt = json.loads((clone / "models/registered.json").read_text(encoding="utf-8"))
    assert set(receipt) == {"name", "sha256"}


def test_the_lock_holds_no_path_of_this_machine(done: Workspace) -> None:
    lock = (done.root / "dvc.lock").read_text(encoding="utf-8")
    assert str(done.root) not in lock
    assert yaml.safe_load(lock)["stages"]
