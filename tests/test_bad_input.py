"""Bad input: one clear message, an exit code that is not 0, nothing half-written."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from stages import ingest, scan, shard, validate
from stages.data.raw.facts import ACCEPTED
from stages.data.shards.loading.samples.index import read_samples
from stages.params.all import check_all
from stages.params.register import Register
from stages.runtime.params_file import ParamsError, load_section
from stages.runtime.tables import read_table, write_table
from tests.workspace import ROOT, SMALL, call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with params.yaml of the small sample."""
    write_params(tmp_path, {})
    shutil.copy(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    return tmp_path


def write_params(folder: Path, changes: dict[str, Any]) -> None:
    """params.yaml of the repository with the small sample and `changes`."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")) | SMALL | changes
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def run(folder: Path, *arguments: str) -> str:
    """Runs a stage as a process, which must fail with one message; it is returned."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SYNSET_TRACKING": "off", "HOME": str(folder)}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    return done.stderr[done.stderr.index("error: ") :]


def failed(folder: Path, main: Callable[[], object], *arguments: str) -> str:
    """The one message with which a stage fails in this process: what it would print, with exit code 1."""
    with pytest.raises(SystemExit) as ended:
        call(folder, main, *arguments, SYNSET_TRACKING="off")
    message = str(ended.value.code)
    assert message.startswith("error: ") and message.count("error: ") == 1, message
    return message


def whole_outputs(folder: Path) -> list[str]:
    """Files in places where DVC would take them for outputs."""
    return [
        str(path) for place in ("data", "models", "reports") for path in (folder / place).rglob("*") if path.is_file()
    ]


def batch(source: str, role: str = "finetune") -> dict[str, Any]:
    """A section `batches` with one batch, `mine`."""
    return {"batches": {"mine": {"role": role, "source": source}}}


def picture(path: Path, seed: int) -> None:
    """A small JPEG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(path)


@pytest.mark.parametrize("source", ["nowhere", "sample:nothing", "sample:target?sed=1", "sample:target?seed=x"])
def test_no_such_source(folder: Path, source: str) -> None:
    write_params(folder, batch(source))
    assert source.split("?")[0] in failed(folder, ingest.main, "mine")
    assert whole_outputs(folder) == []


def test_an_empty_folder(folder: Path) -> None:
    (folder / "data/incoming/empty").mkdir(parents=True)
    write_params(folder, batch("empty"))
    assert "no class folder" in failed(folder, ingest.main, "mine")


def test_a_class_folder_with_no_file(folder: Path) -> None:
    picture(folder / "data/incoming/pets/train/cat/1.jpg", 1)
    (folder / "data/incoming/pets/train/dog").mkdir()
    write_params(folder, batch("pets"))
    assert "train/dog has no file" in failed(folder, ingest.main, "mine")
    assert not (folder / "data/raw").exists() or not any((folder / "data/raw").rglob("*.tar"))


@pytest.mark.parametrize("name", ["a..b", "x.lock", "x.", ".x", "x y", "x/y", "x\n", ""])
def test_a_name_of_which_git_makes_no_tag(folder: Path, name: str) -> None:
    write_params(folder, {"register": {"name": name}})
    with pytest.raises(ParamsError, match=r"`register\.name`: expected letters, digits.*, got"):
        load_section("register", Register, folder / "params.yaml")


def test_names_of_which_git_makes_a_tag(folder: Path) -> None:
    for name in ("x", "Imagenette-64px_v1.2", "a.lock.b"):
        write_params(folder, {"register": {"name": name}})
        assert load_section("register", Register, folder / "params.yaml").name == name
        subprocess.run(["git", "check-ref-format", f"refs/tags/model/{name}/1"], check=True)


def scanned(folder: Path) -> None:
    """Runs ingest and scan of the batch `mine`."""
    for stage in (ingest, scan):
        call(folder, stage.main, "mine", SYNSET_TRACKING="off")


def test_a_class_folder_with_no_readable_image(folder: Path) -> None:
    for number in range(20):
        picture(folder / f"data/incoming/pets/train/{('cat', 'cow')[number % 2]}/{number}.jpg", number)
    (folder / "data/incoming/pets/train/dog").mkdir()
    (folder / "data/incoming/pets/train/dog/1.jpg").write_text("no dog here", encoding="utf-8")
    write_params(folder, batch("pets"))
    scanned(folder)
    assert "dog" in failed(folder, validate.main)
    assert not (folder / "data/accepted").exists()


def test_every_image_corrupt(folder: Path) -> None:
    for number in range(20):
        path = folder / f"data/incoming/pets/train/{('cat', 'cow')[number % 2]}/{number}.jpg"
        picture(path, number)
        path.write_bytes(path.read_bytes()[:-200])
    write_params(folder, batch("pets"))
    scanned(folder)
    message = failed(folder, validate.main)
    assert "mine" in message
    assert "max_quarantined" in message or "accepted" in message
    assert not (folder / "data/accepted").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"finetune": {"epoch": 3}}, "finetune.epoch"),
        ({"finetune": {"epochs": "three"}}, "finetune.epochs"),
        ({"finetune": {"lr": -1.0}}, "finetune.lr"),
        ({"split": {"val_fraction": 1.5}}, "split.val_fraction"),
        ({"colour": {}}, "colour"),
        ({"model": {"architecture": "resnet18", "image_size": 64}}, "shard.pretrain.resize"),
        ({"batches": {"a": {"role": "pretrain", "source": "x"}}}, "finetune"),
        ({"batches": {"a": {"role": "finetune", "source": "x"}}}, "pretrain.method"),
        ({"batches": {}}, "batches"),
        ({"batches": {"a": {"role": "finetune"}}}, "batches.a.source"),
        ({"batches": {"a": {"role": "teacher", "source": "x"}}}, "batches.a.role"),
        ({"batches": {"week.47": {"role": "finetune", "source": "x"}}}, "week.47"),
        ({"batches": {"../x": {"role": "finetune", "source": "x"}}}, "../x"),
        ({"batches": {"2026-11-23": {"role": "finetune", "source": "x"}}}, "2026-11-23"),
    ],
)
def test_bad_parameters(folder: Path, changes: dict[str, Any], named: str) -> None:
    write_params(folder, changes)
    assert named in failed(folder, check_all)


def test_a_batch_named_by_an_unquoted_date(folder: Path) -> None:
    write_params(folder, {})
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    (folder / "params.yaml").write_text(text.replace("  target:", "  2026-11-23:"), encoding="utf-8")
    for module in ("stages.params.all", "stages.validate"):
        assert "`2026-11-23`" in run(folder, module)


def test_an_architecture_that_does_not_exist(folder: Path) -> None:
    write_params(folder, {"model": {"architecture": "resnet81", "image_size": 32}, "pretrain": {"method": "none"}})
    message = run(folder, "stages.pretrain")
    assert "resnet81" in message
    assert "resnet18" in message
    assert whole_outputs(folder) == []


def test_a_damaged_shard(folder: Path) -> None:
    raw = folder / "data/raw/finetune/mine"
    for number in range(4):
        picture(folder / f"data/incoming/pets/{('cat', 'cow')[number % 2]}/{number}.jpg", number)
    write_params(folder, batch("pets"))
    scanned(folder)
    facts = read_table(folder / "data/facts/finetune/mine.parquet")
    write_table(facts.assign(split="train", label=0), ACCEPTED, folder / "data/accepted/finetune/mine.parquet")
    call(folder, shard.main, "mine", SYNSET_TRACKING="off")
    path = folder / "data/shards/finetune/mine/train-00000.tar"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    message = failed(folder, lambda: read_samples([Path("data/shards/finetune/mine")], "train"))
    assert "train-00000.tar is damaged" in message
    assert "dvc checkout data/shards/finetune/mine" in message

    tar = raw / "all/cat.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    shutil.rmtree(folder / "data/shards")
    assert re.search(r"cat\.tar is damaged.*dvc checkout", failed(folder, shard.main, "mine"))
    assert not any((folder / "data/shards").rglob("*.tar"))
