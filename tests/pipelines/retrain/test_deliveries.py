"""Deliveries: what is new, what is left alone, and that nothing is read twice."""

import os
from pathlib import Path

import pytest

from pipelines.retrain.deliveries import (
    FoundDeliveries,
    Memory,
    batch_name,
    find_deliveries,
    remembered,
)
from pipelines.retrain.incoming import READY, listing
from stages.runtime.command import StageError

RULES = "max_quarantined: 0.1"


def deliver(incoming: Path, name: str, ready: bool = True, **files: str) -> Path:
    """A delivery; `cat_1="..."` is its file cat/1."""
    for file, content in (files or {"cat_1": name}).items():
        path = incoming / name / file.replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    if ready:
        (incoming / name / READY).touch()
    return incoming / name


class Reader:
    """Stands for the process that computes digests; counts what it reads."""

    def __init__(self, incoming: Path) -> None:
        self.incoming, self.read = incoming, list[str]()

    def __call__(self, name: str) -> str:
        self.read.append(name)
        files = sorted(path for path in (self.incoming / name).rglob("*") if path.is_file() and path.name != READY)
        if not files:
            raise StageError("holds no class folder")
        return "-".join(path.read_text() for path in files)


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return remembered(tmp_path / "memory.json")


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    (tmp_path / "incoming").mkdir()
    return tmp_path / "incoming"


def found(
    incoming: Path, memory: Memory, batches: dict[str, object] | None = None, back: list[str] | None = None
) -> FoundDeliveries:
    """A look with a reader of its own."""
    return find_deliveries(incoming, batches or {}, back or [], RULES, memory, Reader(incoming))


@pytest.mark.parametrize(
    ("delivery", "batch"),
    [
        ("2026-11-23", "d-2026-11-23"),
        ("pets", "pets"),
        ("Pets", ""),
        ("a b", ""),
        ("x.tmp", ""),
        ("ä", ""),
        ("_x", "d-_x"),
    ],
)
def test_the_name_of_a_delivery_becomes_that_of_a_batch(delivery: str, batch: str) -> None:
    assert batch_name(delivery) == batch


def test_what_is_complete_is_new_in_the_order_of_names(incoming: Path, memory: Memory) -> None:
    for name in ("2026-11-24", "2026-11-23"):
        deliver(incoming, name)
    deliver(incoming, "2026-11-25", ready=False)
    (incoming / ".hidden").mkdir()
    (incoming / "notes.txt").touch()
    result = found(incoming, memory)
    assert [each.batch for each in result.ready] == ["d-2026-11-23", "d-2026-11-24"]
    assert result.ready[0].entry() == {"role": "finetune", "source": "2026-11-23", "digest": "2026-11-23"}
    assert list(result.left_alone) == ["2026-11-25"]
    assert "_READY" in result.left_alone["2026-11-25"]
    assert found(incoming / "nowhere", memory) == FoundDeliveries()


def test_nothing_is_read_twice_even_by_another_process(incoming: Path, memory: Memory) -> None:
    folder, reader = deliver(incoming, "a"), Reader(incoming)
    find_deliveries(incoming, {}, [], RULES, memory, reader)
    (folder / READY).touch()
    find_deliveries(incoming, {}, [], RULES, remembered(memory.path), reader)
    assert reader.read == ["a"]
    memory.path.write_text("{half")
    assert remembered(memory.path).digests == {}


def test_odd_names_are_named_and_never_end_the_look(incoming: Path, memory: Memory) -> None:
    deliver(incoming, "Upper Case")
    deliver(incoming, "2026")
    deliver(incoming, "d-2026")
    os.mkdir(os.fsencode(incoming) + b"/\xff\xfe")  # noqa: PTH102
    Path(os.fsdecode(os.fsencode(incoming) + b"/\xff\xfe/" + READY.encode())).touch()
    deliver(incoming, "x" * 80)
    result = found(incoming, memory)
    assert [each.name for each in result.ready] == ["2026"]
    assert set(result.left_alone) == {"Upper Case", "d-2026", "\\xff\\xfe", "x" * 80}
    assert "as that of 2026" in result.left_alone["d-2026"]
    "".join(result.left_alone).encode()


def test_one_that_is_no_folder_of_classes_is_unreadable_not_ready(incoming: Path, memory: Memory) -> None:
    (incoming / "empty").mkdir()
    (incoming / "empty" / READY).touch()
    deliver(incoming, "good")
    result = found(incoming, memory)
    assert result.unreadable == {"empty": "holds no class folder"}
    assert [each.name for each in result.ready] == ["good"]


def test_one_that_may_not_be_read_holds_up_no_other(
    incoming: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(incoming, "closed")
    deliver(incoming, "open")
    is_file = Path.is_file

    def refused(path: Path) -> bool:  # as of a folder of another user's, mode 0700; to root none is closed
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    result = found(incoming, memory)
    assert "Permission denied" in result.unreadable["closed"]
    assert [each.name for each in result.ready] == ["open"]


def test_one_that_changes_while_it_is_read_is_left_alone(incoming: Path, memory: Memory) -> None:
    folder = deliver(incoming, "a")

    def read(name: str) -> str:
        (folder / "cat" / "2").touch()
        return "half of it"

    result = find_deliveries(incoming, {}, [], RULES, memory, read)
    assert result.left_alone == {"a": "still being copied: it changed while it was read"}
    assert memory.digests == {}
    assert [each.digest for each in found(incoming, memory).ready] == ["a-"]


def test_an_accepted_one_is_no_news_and_a_change_is_named(incoming: Path, memory: Memory) -> None:
    folder = deliver(incoming, "2026-11-23", cat_1="one")
    batches: dict[str, object] = {"d-2026-11-23": {"role": "finetune", "source": "2026-11-23", "digest": "one"}}
    assert found(incoming, memory, batches) == FoundDeliveries()
    reader = Reader(incoming)
    os.utime(folder / "cat/1")  # copied again, the same
    assert find_deliveries(incoming, batches, [], RULES, memory, reader) == FoundDeliveries()
    find_deliveries(incoming, batches, [], RULES, memory, reader)
    assert reader.read == ["2026-11-23"]

    (folder / "cat/1").write_text("another")
    result = found(incoming, memory, batches)
    assert "changed after it was accepted as d-2026-11-23" in result.left_alone["2026-11-23"]
    (folder / "cat/1").unlink()
    assert "changed after" in found(incoming, memory, batches).left_alone["2026-11-23"]
    (folder / READY).unlink()  # being cleared away
    assert found(incoming, memory, batches) == FoundDeliveries()


def test_a_name_that_is_taken_or_was_taken_back_is_left_alone(incoming: Path, memory: Memory) -> None:
    deliver(incoming, "target")
    deliver(incoming, "back")
    result = found(incoming, memory, {"target": {"role": "finetune", "source": "sample:target"}}, ["back"])
    assert not result.ready
    assert "another batch target" in result.left_alone["target"]
    assert "taken back" in result.left_alone["back"]
    # Listed by hand, without a digest: nothing to compare with.
    assert (
        found(incoming, memory, {"target": {"source": "target?seed=1"}, "back": {"source": "back"}})
        == FoundDeliveries()
    )


def test_the_source_of_a_batch_with_another_name_is_no_delivery(incoming: Path, memory: Memory) -> None:
    deliver(incoming, "imagenette2", ready=False)
    deliver(incoming, "tents")
    listed = {"target": {"source": "imagenette2/?seed=1"}, "extra": {"source": "tents"}, "odd": None}
    assert found(incoming, memory, dict(listed)) == FoundDeliveries()


def test_a_refused_one_is_left_alone_until_it_or_the_rules_change(incoming: Path, memory: Memory) -> None:
    folder = deliver(incoming, "bad", cat_1="one")
    new = found(incoming, memory).ready[0]
    memory.refused["bad"] = {"listing": new.listing, "digest": new.digest, "rules": RULES, "reasons": ["40 % broken"]}
    assert found(incoming, memory).left_alone == {"bad": "refused before: 40 % broken"}
    os.utime(folder / "cat/1")
    assert found(incoming, memory).left_alone == {"bad": "refused before: 40 % broken"}
    assert find_deliveries(incoming, {}, [], "other rules", memory, Reader(incoming)).ready
    (folder / "cat/1").write_text("better")
    assert [each.digest for each in found(incoming, memory).ready] == ["better"]


def test_a_listing_knows_names_sizes_and_times(incoming: Path) -> None:
    folder = deliver(incoming, "a", cat_1="one", cat_2="two")
    before = listing(folder)
    (folder / READY).unlink()
    (folder / "cat/.hidden").touch()
    assert listing(folder) == before
    (folder / "cat/2").rename(folder / "cat/3")
    renamed = listing(folder)
    os.utime(folder / "cat/1", (1, 1))
    assert len({before, renamed, listing(folder)}) == 3


def test_a_link_in_a_circle_is_said(incoming: Path, memory: Memory) -> None:
    folder = deliver(incoming, "a")
    (folder / "cat" / "loop").symlink_to(folder)
    assert "is a link" in found(incoming, memory).unreadable["a"]
