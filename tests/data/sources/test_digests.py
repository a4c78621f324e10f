"""Digests: what a source holds, and ingest that refuses one which holds anything else."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.data.sources.digests import raw_digest, source_digest
from stages.runtime.command import StageError
from tests.closure import ROOT


def put(folder: Path, **files: str) -> Path:
    """Files of classes: `cat_1="..."` is cat/1."""
    for name, content in files.items():
        path = folder / name.replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_a_digest_is_over_sorted_names_and_contents(tmp_path: Path) -> None:
    put(tmp_path / "a", dog_2="two", cat_1="one")
    lines = [
        f"all/{name}\0{hashlib.sha256(text).hexdigest()}\n" for name, text in (("cat/1", b"one"), ("dog/2", b"two"))
    ]
    assert source_digest("a", tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_it_knows_names_contents_and_places_and_nothing_else(tmp_path: Path) -> None:
    before = source_digest("a", put(tmp_path, a_cat_1="one", a_dog_2="two"))
    (tmp_path / "a/_READY").touch()
    put(tmp_path, **{"a_cat_.hidden": "x"})
    assert source_digest("a", tmp_path) == before
    others = [{"cat_1": "one!", "dog_2": "two"}, {"cat_1": "one", "dog_3": "two"}, {"cat_1": "one", "cow_2": "two"}]
    found = {
        source_digest(f"b{number}", tmp_path)
        for number, files in enumerate(others)
        if put(tmp_path / f"b{number}", **files)
    }
    assert len(found | {before}) == 4


def test_a_source_without_images_has_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StageError, match="class folder"):
        source_digest("a", tmp_path)


def ingest(folder: Path) -> "subprocess.CompletedProcess[str]":
    """The stage, in a folder with nothing but params.yaml and deliveries."""
    shutil.copy(ROOT / "dvc.yaml", folder / "dvc.yaml")
    command = [sys.executable, "-m", "stages.ingest", "new"]
    environment = {"PYTHONPATH": str(ROOT), "SYNSET_INCOMING": str(folder), "SYNSET_WORKERS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_ingest_refuses_a_source_that_no_longer_has_its_digest(tmp_path: Path) -> None:
    digest = source_digest("a", put(tmp_path, a_cat_1="one", a_dog_2="two"))
    batch = {"role": "finetune", "source": "a", "digest": digest}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"batches": {"new": batch}}))
    assert ingest(tmp_path).returncode == 0
    raw = tmp_path / "data/raw/finetune/new"
    assert sorted(path.name for path in raw.rglob("*.tar")) == ["cat.tar", "dog.tar"]
    assert raw_digest(raw) == digest

    before = (raw / "all/cat.tar").read_bytes()
    put(tmp_path, a_cat_1="another")
    ended = ingest(tmp_path)
    assert ended.returncode == 1
    assert "is not what batch new was accepted with" in ended.stderr
    assert (raw / "all/cat.tar").read_bytes() == before
    assert not list(raw.parent.glob(".*"))
