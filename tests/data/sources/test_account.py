"""The account says what ingest understood of a source: in counts and words, the same however it was read."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.data.sources.account import Seen, account, as_text, class_order
from stages.data.sources.dispatch import read_source
from stages.data.sources.parts import LeftOut
from stages.ingest import main
from tests.packing import parquet, tar_bytes, write
from tests.test_ingest import Checkout


def account_of(source: str, incoming: Path) -> dict[str, Any]:
    """From the names alone, as --look does."""
    read, seen = read_source(source, incoming), Seen()
    for part in read.parts:
        for item in part.names():
            seen.see(item, read.choice.takes(item))
    return account(read, seen)


def pets(folder: Path, **counts: int) -> None:
    """Class folders in splits: `train_cat=3`."""
    for key, count in counts.items():
        split, _, name = key.partition("_")
        for number in range(count):
            write(folder / split / name / f"{number}.jpg", b"x")


def test_splits_classes_and_images_are_counted(tmp_path: Path) -> None:
    pets(tmp_path / "in", train_cat=12, train_dog=15, val_cat=11, val_dog=10)
    values = account_of("in", tmp_path)
    assert values["splits"] == {"train": 27, "val": 21}
    assert values["classes"] == {"count": 2, "first": ["cat", "dog"], "last": []}
    assert values["suffixes"] == {".jpg": 48}
    assert values["odd"] == []
    lines = dict(values["understood"])
    assert lines["images"] == "48: train 27, val 21"
    assert lines["labels"] == "every image has one"
    assert lines["classes"] == "2, in the order of their names: cat, dog"
    assert lines["left out"] == "nothing"


def test_the_query_is_said_with_what_it_leaves(tmp_path: Path) -> None:
    pets(tmp_path / "in", train_cat=4, train_dog=5, train_bee=6)
    assert dict(account_of("in?classes=cat,dog&images_per_class=2", tmp_path)["understood"])["chosen"] == (
        "classes=cat,dog, images_per_class=2; not taken: 1 whole classes and 5 images"
    )
    values = account_of("in?unlabelled=true", tmp_path)
    assert values["unlabelled"] == 15 and values["classes"]["count"] == 0
    assert dict(values["understood"])["labels"] == "none"


def test_whole_numbers_are_numbered_by_their_value(tmp_path: Path) -> None:
    for name in range(12):
        write(tmp_path / f"in/{name}/1.jpg", b"x")
    assert dict(account_of("in", tmp_path)["understood"])["classes"] == "12, numbered by their value: 0, 1, 2, ..., 11"
    assert class_order(["10", "9", "b", "09", "a"]) == ["09", "9", "10", "a", "b"]


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    files = {"top/cat/1.jpg": b"x", "top/dog/1.jpg": b"x", "top/README": b"x"}
    write(tmp_path / "in.tar", tar_bytes(files))
    values = account_of("in.tar", tmp_path)
    assert {why: each["files"] for why, each in values["left_out"].items()} == {
        "file outside of the class folders": 1,
    }
    assert "1 × file outside of the class folders (top/README)" in as_text(values)
    assert "1 of 3 files are left out" in values["odd"]


def test_files_that_are_no_images_by_their_names(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "cat/Thumbs.db", "dog/2.jpg", "dog/labels.csv"):
        write(tmp_path / "in" / name, b"x")
    values = account_of("in", tmp_path)
    assert [each["files"] for each in values["noted"].values()] == [2]
    rows = [{"image": b"x", "label": "a"}]
    parquet(tmp_path / "hf/train-0.parquet", rows)
    assert account_of("hf", tmp_path)["noted"] == {}


@pytest.mark.parametrize("source", ["in", "a.tgz", "hf"])
def test_it_is_stored_beside_the_raw_tars_and_tells_nothing_of_the_machine(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pets(tmp_path / "in", train_cat=4, train_dog=5, val_cat=1)
    write(tmp_path / "a.tgz", tar_bytes({f"{c}/{n}.jpg": b"x" for c in "ab" for n in range(9)}, "w:gz"))
    parquet(tmp_path / "hf/train-0.parquet", [{"image": b"x", "label": c} for c in "ab"])
    monkeypatch.setattr(sys, "argv", ["ingest", "new"])
    monkeypatch.setenv("SYNSET_INCOMING", str(tmp_path))
    checkout = Checkout(tmp_path / "checkout", source)
    monkeypatch.chdir(checkout.root)
    with caplog.at_level("INFO"):
        main()
    stored = (checkout.raw / "source.json").read_text()
    expected = account_of(source, tmp_path)
    assert json.loads(stored) == json.loads(json.dumps(expected))
    assert str(tmp_path) not in stored
    assert as_text(expected) in caplog.text


def test_names_that_no_page_could_hold(tmp_path: Path) -> None:
    seen = Seen()
    seen.see(LeftOut(".a\udcff\x1b[31m", "hidden file or folder"), taken=False)
    pets(tmp_path / "in", train_cat=1)
    text = as_text(account(read_source("in", tmp_path), seen))
    assert ".a??[31m" in text and text.encode()


def test_what_parts_saw_is_joined_in_their_order() -> None:
    whole = Seen()
    for part in (Seen(counts={"train": {"a": 1}}, titles={"a": "A/1"}), Seen(counts={"train": {"a": 2, "b": 1}})):
        whole.join(Seen.of(json.loads(json.dumps(vars(part)))))
    assert whole.counts == {"train": {"a": 3, "b": 1}} and whole.titles == {"a": "A/1"}
