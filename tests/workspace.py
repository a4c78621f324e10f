"""A checkout of its own for tests that run `dvc repro`: the project's files, a small sample, few epochs."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipelines.environment import settings
from stages.runtime.command import run

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "batches": {
        "upstream": {"role": "pretrain", "source": "sample:upstream?seed=5&images_per_class=30"},
        "target": {"role": "finetune", "source": "sample:target?seed=5&images_per_class=30"},
    },
    "validate": {"max_quarantined": 0.3, "min_images_per_class": 3},
    "shard": {
        "pretrain": {"resize": 40, "images_per_shard": 100},
        "finetune": {"resize": 40, "images_per_shard": 25},
    },
    "model": {"architecture": "resnet18", "image_size": 32},
    "pretrain": {"epochs": 1, "batch_size": 64, "lr": 0.05},
    "finetune": {"epochs": 1, "batch_size": 32},
    "training": {"threads": 1},  # tests run side by side, and two pools of spinning threads starve each other
    "evaluate": {"gallery": 20, "robustness": {"images": 8, "corruptions": ["fog"], "epsilons": [4], "pgd_steps": 2}},
    "gate": {"min_top1": 0, "min_worst_class": 0, "max_ece": 1},
}


class Workspace:
    """A small checkout below a temporary folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.root = folder
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        for name in filter(None, tracked):
            if (ROOT / name).is_file() and name.split("/")[0] not in ("reports", "docs", "dvc.lock"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.environment = {
            **os.environ,
            **settings(folder),
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", str(ROOT / ".synset/pycache")),  # not one each
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            **environment,
        }
        self.environment.pop("PYTHONPATH", None)
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        self.write_params(params | SMALL)
        for command in (
            ["init", "-q"], ["add", "-A"],
            ["-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "a small checkout"],
        ):  # fmt: skip
            subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)

    @property
    def params(self) -> dict[str, Any]:
        """params.yaml as plain values."""
        return yaml.safe_load((self.root / "params.yaml").read_text(encoding="utf-8"))

    def write_params(self, params: dict[str, Any]) -> None:
        """Replaces params.yaml."""
        (self.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the checkout; output and errors together in `stdout`."""
        return subprocess.run(
            command, cwd=self.root, env=self.environment | environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def call(self, main: Callable[[], object], *arguments: str) -> None:
        """Runs a stage in this process, as its module does: starting Python and importing torch takes seconds."""
        call(self.root, main, *arguments, **self.environment)

    def repro(self, *arguments: str, **environment: str) -> list[str]:
        """`dvc repro`, which must succeed; the stages that ran."""
        done = self.run("dvc", "repro", *arguments, **environment)
        assert done.returncode == 0, done.stdout
        return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]

    def outputs(self) -> dict[str, str]:
        """The checksum of every output by path, as dvc.lock has them."""
        lock = yaml.safe_load((self.root / "dvc.lock").read_text(encoding="utf-8"))
        return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", [])}


def call(folder: Path, main: Callable[[], object], *arguments: str, **environment: str) -> None:
    """Runs a stage in this process, in `folder`, as its module does."""
    sigterm = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["stage", *arguments])
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            run(main)
        finally:
            signal.signal(signal.SIGTERM, sigterm)


def until(true: Callable[[], Any], by: "subprocess.Popen[Any]", what: str = "") -> None:
    """Waits for something that a process is to bring about; fails as soon as that process has ended without."""
    while not true():
        if by.poll() is not None:
            assert true(), f"it ended with {by.returncode} before {what or 'that'}"
            return
        time.sleep(0.01)


def written(folder: Path, pattern: str, by: "subprocess.Popen[Any]") -> Path:
    """The file below `folder`, as soon as it is there; fails where the process that is to write it ends without."""
    until(lambda: list(folder.glob(pattern)), by, f"it wrote {pattern}")
    return next(folder.glob(pattern))


def text_of(path: Path, by: "subprocess.Popen[Any]") -> str:
    """What a process writes into a file, as soon as there is anything."""
    until(lambda: path.exists() and path.read_text().strip(), by, f"it wrote {path}")
    return path.read_text().strip()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock of the file; whoever waits for it goes on after the block, also where the test fails in it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_at_work(pid: int) -> bool:
    """Whether the process is there and has not ended; one that nobody has reaped yet has ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
