"""Whole files or none."""

import errno
from pathlib import Path

import pytest

from stages.runtime.command import StageError, run
from stages.runtime.files import replaced_directory, replaced_file, write_json


def full_disk(path: Path) -> None:
    """What a write to a full disk does: some bytes arrive, then it fails."""
    path.write_text("half of", encoding="utf-8")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": True})
    with pytest.raises(OSError, match=r"a\.json"), replaced_file(tmp_path / "a.json") as aside:
        full_disk(aside)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert "old" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_failure_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "model") as aside:
        (aside / "weights").write_text("old", encoding="utf-8")
    with pytest.raises(OSError, match="model"), replaced_directory(tmp_path / "model") as aside:
        full_disk(aside / "weights")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]
    assert (tmp_path / "model/weights").read_text(encoding="utf-8") == "old"


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp/stale").touch()
    with replaced_directory(tmp_path / "model") as aside:
        (aside / "weights").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights"]


def test_a_full_disk_is_one_message_and_names_the_place(tmp_path: Path) -> None:
    def stage() -> None:
        with replaced_file(tmp_path / "shard.tar") as aside:
            full_disk(aside)

    with pytest.raises(SystemExit, match=r"no space left on the device while writing .*shard\.tar"):
        run(stage)


def test_other_errors_keep_their_traceback() -> None:
    def stage() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run(stage)
    with pytest.raises(SystemExit, match="error: what to do"):
        run(lambda: (_ for _ in ()).throw(StageError("what to do")))
