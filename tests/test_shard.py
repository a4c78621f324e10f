"""The stage shard: killed anywhere it goes on from its finished shards, here and on a Dask cluster; the same bytes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from tests.shard_batch import accepted_batch
from tests.workspace import ROOT, held, until, written

FAULTS = str(ROOT / "tests/faults")
IMAGES = 120
SHARDS = 25  # 20 of train, 5 of test: of every class the fifths are rounded up


def faulty(fault: str, folder: Path) -> dict[str, str]:
    """Environment of a process with a fault of tests/faults; one that holds waits for the lock of `folder`/held."""
    return {"SYNSET_FAULT": fault, "PYTHONPATH": FAULTS, "SYNSET_HOLD": str(folder / "held")}


class Checkout:
    """What the stage shard reads: parameters, code, raw tars and accepted rows of the batch `mine`."""

    def __init__(self, root: Path, cluster: str | None = None) -> None:
        self.root = root
        (root / "stages").symlink_to(ROOT / "stages")
        shutil.copy2(ROOT / "dvc.yaml", root)
        section = {"resize": 40, "images_per_shard": 5}
        params = {
            "batches": {"mine": {"role": "finetune", "source": "mine"}},
            "shard": {"cluster": cluster, "pretrain": section, "finetune": section},
        }
        (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        accepted = accepted_batch(root / "data/raw/finetune/mine", IMAGES)
        (root / "data/accepted/finetune").mkdir(parents=True)
        accepted.to_parquet(root / "data/accepted/finetune/mine.parquet")

    def start(self, fault: str = "", workers: int = 2) -> "subprocess.Popen[str]":
        """`python -m stages.shard mine`; its words on `stdout`."""
        environment = os.environ | {"SYNSET_WORKERS": str(workers)}
        environment |= faulty(fault, self.root) if fault else {}
        return subprocess.Popen(
            [sys.executable, "-m", "stages.shard", "mine"], cwd=self.root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, fault: str = "", workers: int = 2) -> tuple[int, str]:
        """Exit code and words."""
        process = self.start(fault, workers)
        words, _ = process.communicate()
        return process.returncode, words

    def contents(self) -> dict[str, bytes]:
        """Of the finished set, by name."""
        return {path.name: path.read_bytes() for path in (self.root / "data/shards/finetune/mine").iterdir()}

    def finished(self) -> dict[str, int]:
        """When each shard was written of which there is an entry, by name."""
        works = [*(self.root / ".synset/work/shard@mine").glob("*")]
        entries = [path for work in works for path in work.glob("entries/*.json")]
        places = [*(work / "shards" for work in works), self.root / "data/shards/finetune/mine"]
        names = [f"{path.stem}.tar" for path in entries]
        return {
            name: (place / name).stat().st_mtime_ns for place in places for name in names if (place / name).exists()
        }

    def written_when(self) -> dict[str, int]:
        """Of each shard of the finished set."""
        return {path.name: path.stat().st_mtime_ns for path in (self.root / "data/shards/finetune/mine").glob("*.tar")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shard set as one run writes it."""
    checkout = Checkout(tmp_path_factory.mktemp("undisturbed"))
    assert checkout.run(workers=1)[0] == 0
    assert len([name for name in checkout.contents() if name.endswith(".tar")]) == SHARDS
    assert not list((checkout.root / ".synset/work/shard@mine").iterdir())
    return checkout.contents()


FAULTS_IN_RENAMES = [
    "kill plan/test.parquet 1",
    "full train-00003.tar 1",
    "kill train-00003.tar 1",  # written, to its own name
    "kill train-00003.tar 2",  # to the finished ones
    "kill train-00003.idx 2",
    "kill entries/train-00003.json 1",
    "kill index.json 1",
    "full data/shards/finetune/mine 1",
    "kill data/shards/finetune/mine 1",
]


def test_a_fault_in_any_rename_costs_nothing_that_was_finished(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    checkout = Checkout(tmp_path)
    before: dict[str, int] = {}
    for at in FAULTS_IN_RENAMES:
        fault, text, count = at.split()
        code, words = checkout.run(f"{fault} stages.shard os.rename {text} {count}")
        assert code != 0, f"{at} did not come"
        assert f"fault: {fault} at os.rename of {text}" in words
        assert "Traceback" not in words, words
        assert not (tmp_path / "data/shards/finetune/mine").exists()
        after = checkout.finished()
        assert {name: after[name] for name in before} == before, at
        print(f"{at}: {len(after)} of {SHARDS} finished", flush=True)
        before = after
    assert checkout.run()[0] == 0
    assert checkout.written_when() == before
    assert checkout.contents() == undisturbed
    assert not list((tmp_path / ".synset/work/shard@mine").iterdir())


def test_killed_in_the_middle_its_workers_end_too_and_the_rest_is_done_later(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    checkout = Checkout(tmp_path)
    with held(tmp_path / "held"):  # each worker stands still with its third shard
        process = checkout.start("hold stages.shard os.rename entries/ 3")
        until(lambda: len(checkout.finished()) >= 4, process)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.kill()
        process.communicate()
        psutil.wait_procs(workers)
    before = checkout.finished()
    assert len(before) == 4
    assert checkout.run()[0] == 0
    after = checkout.written_when()
    assert {name: after[name] for name in before} == before
    assert checkout.contents() == undisturbed


def test_other_parameters_do_not_take_up_the_work(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    assert checkout.run("kill stages.shard os.rename index.json 1")[0] != 0
    path = tmp_path / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["shard"]["finetune"]["quality"] = 50
    path.write_text(yaml.safe_dump(params))
    assert checkout.run()[0] == 0
    assert json.loads(checkout.contents()["index.json"])["quality"] == 50
    assert not list((tmp_path / ".synset/work/shard@mine").iterdir())


@contextmanager
def program(folder: Path, name: str, *arguments: str, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`python -m dask` in a folder of its own, until the end of the block."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments, "--no-dashboard"], cwd=folder, stdout=log, stderr=log,
            env=os.environ | environment,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def scheduler(folder: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A Dask scheduler and its address."""
    file = folder / "scheduler.json"
    arguments = ("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
    with program(folder, "scheduler", *arguments) as process:
        until(lambda: file.exists() and file.read_text().endswith("}"), process)  # it is written in place
        yield json.loads(file.read_text())["address"], process


def worker(folder: Path, address: str, name: str, **environment: str) -> "ExitStack":
    """A Dask worker: one process that nobody starts again, and that knows nothing of the checkout."""
    stack = ExitStack()
    arguments = ("worker", address, "--nthreads", "1", "--no-nanny", "--name", name)
    stack.process = stack.enter_context(program(folder, name, *arguments, **environment))  # type: ignore[attr-defined]
    return stack


def test_a_dask_cluster_writes_the_same_bytes_even_if_a_worker_dies(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    with held(tmp_path / "held"), scheduler(tmp_path / "dask") as (address, _), ExitStack() as stack:
        # It stands still in the middle of a shard of the second run, so that it is there to be killed.
        fault = faulty(f"hold dask os.rename {tmp_path}/died/ 5", tmp_path)
        one = stack.enter_context(worker(tmp_path / "dask", address, "one", **fault))
        stack.enter_context(worker(tmp_path / "dask", address, "two"))
        (tmp_path / "whole").mkdir()
        checkout = Checkout(tmp_path / "whole", address)
        code, words = checkout.run()
        assert code == 0, words
        assert checkout.contents() == undisturbed

        (tmp_path / "died").mkdir()
        checkout = Checkout(tmp_path / "died", address)
        process = checkout.start()
        written(tmp_path, "held.*", process)
        one.process.kill()  # type: ignore[attr-defined]
        finished = len(checkout.finished())
        words, _ = process.communicate()
        assert process.returncode == 0, words
        assert finished < SHARDS
        assert checkout.contents() == undisturbed


@pytest.mark.slow
def test_what_is_wrong_with_a_cluster_is_said(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    checkout = Checkout(tmp_path, "tcp://127.0.0.1:9")  # where nobody listens
    code, words = checkout.run()
    assert code == 1
    assert re.search(r"^error: `shard.cluster`: no Dask scheduler answers at tcp://127.0.0.1:9 ", words, re.MULTILINE)

    folder = tmp_path / "dask"
    other = folder / "other/numpy-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    with scheduler(folder) as (address, process):
        params = yaml.safe_load((tmp_path / "params.yaml").read_text())
        params["shard"]["cluster"] = address
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        with worker(folder, address, "other", PYTHONPATH=str(other.parent)):
            code, words = checkout.run()
            assert code == 1
            assert re.search(r"^error: Dask worker \S+ would write other bytes: it has numpy 0.1 instead", words, re.M)
        fault = faulty("hold dask os.rename entries/ 3", tmp_path)
        with held(tmp_path / "held"), worker(folder, address, "one", **fault):
            running = checkout.start()
            until(lambda: len(checkout.finished()) >= 2, running)
            process.kill()
            words, _ = running.communicate()
            assert running.returncode == 1
            assert re.search(rf"^error: the Dask scheduler at {address} was lost", words, re.MULTILINE), words
    before = checkout.finished()
    params["shard"]["cluster"] = None
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert checkout.run()[0] == 0
    after = checkout.written_when()
    assert {name: after[name] for name in before} == before
    assert checkout.contents() == undisturbed


def test_an_interrupt_cancels_what_has_not_begun(tmp_path: Path) -> None:
    from distributed import Client

    fault = faulty("hold dask os.rename entries/ 3", tmp_path)
    with scheduler(tmp_path / "dask") as (address, _), worker(tmp_path / "dask", address, "one", **fault):
        with held(tmp_path / "held"):  # or the worker would be through before the interrupt has reached the scheduler
            checkout = Checkout(tmp_path, address)
            process = checkout.start()
            written(tmp_path, "held.*", process)
            process.send_signal(signal.SIGINT)
            process.communicate()
        assert process.returncode != 0
        assert not (tmp_path / "data/shards/finetune/mine").exists()
        with Client(address) as client:
            # The one thread of the worker comes to this after all that it had before.
            assert client.submit(lambda: "idle").result() == "idle"
        assert len(checkout.finished()) < SHARDS
