"""params.yaml edited and united as text: what is not meant stays as it is, to the letter."""

import difflib
import re
from typing import Any

import pytest
import yaml

from pipelines.retrain.batch_list import (
    batches,
    lock_of,
    merge,
    merge_lock,
    retracted,
    with_batch,
    with_retracted,
    without_batch,
)
from stages.runtime.command import StageError
from tests.closure import ROOT

REAL = (ROOT / "params.yaml").read_text(encoding="utf-8")
NEW = {"role": "finetune", "source": "2026-11-23", "digest": "1" * 63 + "e"}
BLOCK = """\
# on top
batches:  # in order of arrival
    # the first
    one:
        role: pretrain
        source: a   # here
    two: {role: finetune, source: b}
# about the split
split: {val_fraction:   0.1}
retrain:
  base: main
  retracted:
  - old
  notify: []
"""


def changed(before: str, after: str) -> list[str]:
    """The lines that differ, as a diff has them."""
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line for line in lines if line[0] in "+-"]


def with_source(text: str, name: str, source: str) -> str:
    """The same with another source of one batch."""
    return re.sub(rf"(\n  {name}:\n(?:    .*\n)*?    source: ).*", rf"\g<1>{source}", text)


def lines_of_new(name: str, indent: int) -> list[str]:
    """What a diff shows of the batch NEW."""
    values = [f"{name}:", "  role: finetune", "  source: '2026-11-23'", f"  digest: {NEW['digest']}"]
    return [f"+ {' ' * indent}{line}" for line in values]


def test_a_new_batch_is_its_own_lines_and_no_other() -> None:
    text = with_batch(REAL, "d-2026-11-23", NEW)
    assert changed(REAL, text) == lines_of_new("d-2026-11-23", 2)
    assert list(batches(text)) == ["upstream", "target", "d-2026-11-23"]
    assert batches(text)["d-2026-11-23"] == NEW
    assert without_batch(text, "d-2026-11-23") == REAL


def test_whatever_way_the_list_is_written() -> None:
    text = with_batch(BLOCK, "new", NEW)
    assert changed(BLOCK, text) == lines_of_new("new", 4)
    assert list(batches(without_batch(BLOCK, "one"))) == ["two"]
    assert "the first" not in without_batch(BLOCK, "one")
    assert without_batch(BLOCK, "two") == BLOCK.replace("    two: {role: finetune, source: b}\n", "")
    braces = 'a: 1\nbatches: {one: {role: finetune, source: "x?seed=1"},\n  two: {role: finetune, source: b}}\nb: 2\n'
    found = yaml.safe_load(with_batch(braces, "new", NEW))
    assert list(found) == ["a", "batches", "b"]
    assert list(found["batches"]) == ["one", "two", "new"]
    assert found["batches"]["one"] == {"role": "finetune", "source": "x?seed=1"}
    dumped = yaml.safe_dump(yaml.safe_load(BLOCK), sort_keys=False)
    assert list(batches(with_batch(dumped, "new", NEW))) == ["one", "two", "new"]
    with pytest.raises(StageError, match="at least one batch"):
        with_batch("batches: {}\n", "new", NEW)


@pytest.mark.parametrize("text", [REAL, BLOCK, "batches: {a: {}}\nretrain:\n  base: main\n", "retrain: {}\n"])
def test_names_taken_back_are_listed(text: str) -> None:
    found = with_retracted(text, ["d-1", "d-2"])
    assert retracted(found) == ["d-1", "d-2"]
    expected: dict[str, Any] = yaml.safe_load(text)
    expected["retrain"]["retracted"] = ["d-1", "d-2"]
    assert yaml.safe_load(found) == expected
    assert retracted(with_retracted(found, [])) == []


def test_two_lists_are_united_ours_first() -> None:
    ours = with_batch(REAL, "d-1", NEW)
    theirs = with_batch(REAL, "pets", {"role": "finetune", "source": "pets"}).replace("alpha: 0.05", "alpha: 0.01")
    united = merge(REAL, ours, theirs)
    assert list(batches(united)) == ["upstream", "target", "d-1", "pets"]
    assert "alpha: 0.01" in united
    assert all(line.startswith("+ ") for line in changed(theirs, united))
    assert merge(REAL, REAL, REAL) == REAL


def test_what_one_side_removed_or_changed_is() -> None:
    ancestor = with_batch(with_batch(REAL, "d-1", NEW), "d-2", NEW)
    ours = with_retracted(without_batch(ancestor, "d-1"), ["d-1"])
    theirs = with_source(ancestor, "target", "pets")
    united = merge(ancestor, ours, theirs)
    assert list(batches(united)) == ["upstream", "target", "d-2"]
    assert batches(united)["target"]["source"] == "pets"
    assert retracted(united) == ["d-1"]
    # A squashed merge brings it as something new; or it was changed there.
    edited = with_source(ancestor, "d-1", "pets")
    assert list(batches(merge(ancestor, ours, edited))) == ["upstream", "target", "d-2"]
    assert list(batches(merge(REAL, with_retracted(REAL, ["d-1"]), ancestor))) == ["upstream", "target", "d-2"]
    # Allowed again by hand, on the other side.
    assert retracted(merge(ours, with_batch(ours, "d-3", NEW), with_retracted(ours, []))) == []


def test_what_both_changed_in_different_ways_is_named() -> None:
    ours, theirs = with_source(REAL, "target", "a"), with_source(REAL, "target", "b")
    with pytest.raises(StageError, match=r"`batches\.target` was changed on both sides"):
        merge(REAL, ours, theirs)
    with pytest.raises(StageError, match=r"`batches\.target`"):
        merge(REAL, without_batch(REAL, "target"), theirs)
    assert merge(REAL, ours, ours) == ours
    with pytest.raises(StageError, match="in the same lines"):
        merge(REAL, REAL.replace("margin: 0.01", "margin: 0.02"), REAL.replace("margin: 0.01", "margin: 0.03"))


def test_lists_written_in_different_ways_are_united() -> None:
    other = BLOCK.replace("    ", "  ")
    theirs = with_batch(other, "pets", {"role": "finetune", "source": "pets"})
    united = yaml.safe_load(merge(other, with_batch(BLOCK, "d-1", NEW), theirs))
    assert list(united["batches"]) == ["one", "two", "d-1", "pets"]
    assert united["batches"]["one"] == {"role": "pretrain", "source": "a"}


LOCK = "schema: '2.0'\nstages:\n  ingest@one:\n    cmd: a\n  ingest@two:\n    cmd: b\n  evaluate:\n    cmd: c\n"


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
