"""params.yaml edited and united as text: what is not meant stays as it is, to the letter."""

import difflib
from typing import Any

import pytest
import yaml

from pipelines.batch_list import (
    batches,
    lock_of,
    merge,
    merge_lock,
    retracted,
    with_batch,
    with_retracted,
    without_batch,
)
from stages.command import StageError
from tests.closure import ROOT

REAL = (ROOT / "params.yaml").read_text(encoding="utf-8")
NEW = {"role": "finetune", "source": "2026-11-23", "digest": "1" * 63 + "e"}
BLOCK = "schema: '2.0'\nstages:\n  ingest@one:\n    cmd: a\n  ingest@two:\n    cmd: b\n  evaluate:\n    cmd: c\n"


def test_locks_are_united_stage_by_stage() -> None:
    ours = LOCK.replace("cmd: c", "cmd: ours") + "  ingest@d-1:\n    cmd: d\n"
    theirs = LOCK.replace("cmd: c", "cmd: theirs").replace("cmd: a", "cmd: other") + "  ingest@pets:\n    cmd: e\n"
    stages = yaml.safe_load(merge_lock(LOCK, ours, theirs))["stages"]
    assert {name: stage["cmd"] for name, stage in stages.items()} == {
        "ingest@one": "other", "ingest@two": "b", "evaluate": "ours", "ingest@d-1": "d", "ingest@pets": "e",
    }  # fmt: skip
    assert merge_lock(LOCK, ours, LOCK) == ours
    assert merge_lock("", "", theirs) == theirs


def test_a_lock_forgets_batches_that_are_gone() -> None:
    assert yaml.safe_load(lock_of(LOCK, ["two"]))["stages"] == {"ingest@two": {"cmd": "b"}, "evaluate": {"cmd": "c"}}
    assert lock_of(LOCK, ["one", "two"]) == LOCK
    assert lock_of("", []) == ""
