"""--look: what ingest would understand of any source, in a folder without params.yaml, and nothing is written."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest
import yaml

from stages.data.sources import preview as previewing
from stages.data.sources.dispatch import read_source
from stages.data.sources.preview import Budget, preview
from stages.ingest import main
from stages.runtime.command import StageError, run
from tests.data.sources.test_remote import packed, upload
from tests.packing import tar_bytes, write


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory; it stays empty."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.iterdir())


def test_every_kind_from_here_and_from_a_store(tmp_path: Path, empty: Path) -> None:
    sources = packed(tmp_path / "in")
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    upload(tmp_path / "in", "memory://bucket")
    for source in [*sources, "sample:target?images_per_class=4"]:
        here, there = preview(source, tmp_path / "in"), preview(source, "memory://bucket")
        assert here == there, source
        batches = yaml.safe_load(here.partition("in params.yaml:")[2])["batches"]
        assert [batch["source"] for batch in batches.values()] == [source]
    filesystem.store.clear()


def test_a_path_of_the_shell_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write(tmp_path / f"here/{name}/1.jpg", b"x")
    monkeypatch.chdir(tmp_path)
    assert f"source: {tmp_path}/here?seed=1\n" in preview("here?seed=1", "elsewhere") + "\n"
    write(tmp_path / "elsewhere/here/c/1.jpg", b"x")
    assert "source: here" in preview("here", "elsewhere")
    with pytest.raises(StageError, match="no such source: there"):
        preview("there", "elsewhere")


def test_the_command(
    tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "broken.tgz", b"\x1f\x8bxx")
    write(tmp_path / "in/0/1.jpg", b"x")
    monkeypatch.setenv("SYNSET_INCOMING", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ingest", "--look", "in"])
    run(main)
    shown = capsys.readouterr().out
    assert "odd       there is one class only, 0" in shown and "role: pretrain" in shown and "  b-in:" not in shown
    assert "not readable" in shown, "one image was opened"
    for source in ("broken.tgz", "nothing", "ftp2://x/y"):
        monkeypatch.setattr(sys, "argv", ["ingest", "--look", source])
        with pytest.raises(SystemExit) as ended:
            run(main)
        assert str(ended.value.code).startswith("error: ")
    for arguments in ([], ["--look", "in", "batch"]):
        monkeypatch.setattr(sys, "argv", ["ingest", *arguments])
        with pytest.raises(SystemExit):
            main()


@pytest.mark.parametrize("query", ["classes=a,z", r"group=(\d\d\d)", "unlabelled=skip"])
def test_what_ingest_finds_only_at_the_end(tmp_path: Path, empty: Path, query: str) -> None:
    files = {f"{name}.jpg": b"x" for name in "ab"} if "skip" in query else {f"{name}/1.jpg": b"x" for name in "ab"}
    write(tmp_path / "in.tar", tar_bytes(files))
    with pytest.raises(StageError):
        preview(f"in.tar?{query}", tmp_path)


def test_of_a_long_archive_the_beginning_is_read(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        f"{name}/{number:03d}.jpg": random.Random(number).randbytes(2000) for name in "ab" for number in range(100)
    }
    write(tmp_path / "long.tgz", tar_bytes(files, "w:gz"))
    # What is damaged behind the beginning is not seen, as it is not read.
    data = (tmp_path / "long.tgz").read_bytes()
    write(tmp_path / "long.tgz", data[: len(data) // 2])
    monkeypatch.setattr(previewing, "Budget", lambda: Budget(names=20))
    shown = preview("long.tgz", tmp_path)
    assert "read      the beginning only (20 images)" in shown and "fewer than" not in shown
    with pytest.raises(StageError, match="cut off"):
        list(read_source("long.tgz", tmp_path).parts[0].names())


def test_of_many_shards_every_split_is_seen_first(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in ("train-0", "train-1", "train-2", "val-0"):
        samples = {f"{n}.{kind}": b"c%d" % (n % 2) for n in range(10) for kind in ("jpg", "cls")}
        write(tmp_path / f"wds/{shard}.tar", tar_bytes(samples))
    monkeypatch.setattr(previewing, "Budget", lambda: Budget(names=25))
    shown = preview("wds", tmp_path)
    assert "images    25: train 15, val 10" in shown
    assert "read      2 of 4 files and the beginning only (25 images)" in shown


def test_class_folders_are_counted_whole_when_time_is_over(
    tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        for number in range(12):
            write(tmp_path / f"in/{name}/{number}.jpg", b"x")
    for names in (0, 1, 12, 15, 99):
        monkeypatch.setattr(previewing, "Budget", lambda names=names: Budget(names=names))
        shown = preview("in", tmp_path)
        assert "images    36, without splits" in shown and "  read " not in shown and "  odd " not in shown, shown


def test_a_subset_that_needs_all_names_is_not_drawn(tmp_path: Path, empty: Path) -> None:
    files = {f"{name}/{number}.jpg": b"x" for name in "ab" for number in range(9)}
    write(tmp_path / "in.tar", tar_bytes(files))
    shown = preview(r"in.tar?images_per_class=2&group=(\d)+ *\.&seed=1", tmp_path)
    assert "groups    9, with 18 images" in shown
    assert "images_per_class=2: not applied here" in shown and "images    18" in shown
    assert r"source: in.tar?images_per_class=2&group=(\d)+ *\.&seed=1" in shown
