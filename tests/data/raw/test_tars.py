"""Raw tars: three kinds of them, and a damaged one is never taken for a whole one."""

import errno
import io
import os
import tarfile
from pathlib import Path

import pytest

from stages.data.raw.tars import RawFile, members, raw_tars, read_at
from stages.runtime.command import StageError
from tests.raw_tars import scan_tar


def write(path: Path, *files: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    """A tar as ingest writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("place", "name", "expected"),
    [
        ("train/week.1.tar", "a.JPEG", ("train", "week.1", "a.JPEG")),
        ("all/train-00000.tar", "a.JPEG", ("all", "train-00000", "a.JPEG")),
        ("val/n01.tar", "deep/a.JPEG", ("val", "n01", "deep/a.JPEG")),
        ("train-00012.tar", "n01/a.JPEG", ("train", "n01", "a.JPEG")),
        ("all-00000.tar", "n01/deep/ä.JPEG", ("all", "n01", "deep/ä.JPEG")),
        ("unlabelled/train-00000.tar", "a.JPEG", ("train", "", "a.JPEG")),
        ("unlabelled/all-100000.tar", "deep/a.JPEG", ("all", "", "deep/a.JPEG")),
        ("test/n01.tar", "a\udcff.JPEG", ("test", "n01", "a\\xff.JPEG")),
        ("test/n01.tar", "x" * 300, ("test", "n01", "x" * 300)),
    ],
)
def test_the_place_of_a_tar_says_what_its_members_are(
    tmp_path: Path, place: str, name: str, expected: tuple[str, str, str]
) -> None:
    path = write(tmp_path / place, (name, b"bytes"), (name + "2", b""))
    first, second = members(path, tmp_path)
    assert first[:3] == expected
    assert read_at(path, first.offset, first.size) == b"bytes"
    assert second[2:] == (expected[2] + "2", second.offset, 0, "")
    assert raw_tars(tmp_path) == [path]


def test_the_path_of_an_unlabelled_image_has_an_empty_class() -> None:
    assert RawFile("train", "", "a.JPEG", 512, 9).path == "train//a.JPEG"


@pytest.mark.parametrize("place", ["n01.tar", "fresh/n01.tar", "a/b/n01.tar", "unlabelled/n01.tar", "train-1.tar"])
def test_another_tar_is_refused_by_name(tmp_path: Path, place: str) -> None:
    path = write(tmp_path / place, ("a", b"bytes"))
    with pytest.raises(StageError, match=f"{place} is none of the raw tars"):
        list(members(path, tmp_path))


@pytest.mark.parametrize("name", ["a.JPEG", "/a.JPEG", "../a.JPEG", "./a.JPEG"])
def test_a_mixed_tar_names_classes(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "train-00000.tar", (name, b"bytes"))
    with pytest.raises(StageError, match="is not named <class>/<name>"):
        list(members(path, tmp_path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_only_plain_files_are_in_a_raw_tar(tmp_path: Path, kind: bytes) -> None:
    path = write(tmp_path / "train/n01.tar", ("a", b""), kind=kind)
    with pytest.raises(StageError, match="'a' is no plain file"):
        list(members(path, tmp_path))


@pytest.mark.parametrize("kept", [0, 100, 511, 512, 600, 1023, 1024, 1500, 1536, 2000, 2048, 2100])
def test_a_tar_cut_anywhere_is_damaged(tmp_path: Path, kept: int) -> None:
    """Two members of one block each: headers at 0 and 1024, the end from 2048 on."""
    path = write(tmp_path / "train/n01.tar", ("a", b"x" * 512), ("b", b"y" * 512))
    whole = path.read_bytes()
    assert len(list(members(path, tmp_path))) == 2
    path.write_bytes(whole[:kept])
    with pytest.raises(StageError, match=r"n01.tar is damaged .*; restore the batch with `dvc checkout"):
        list(members(path, tmp_path))


@pytest.mark.parametrize("at", [0, 150, 1024, 1024 + 150, 2048 + 10])
def test_a_damaged_header_is_no_end(tmp_path: Path, at: int) -> None:
    path = write(tmp_path / "train/n01.tar", ("a", b"x" * 512), ("b", b"y" * 512))
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StageError, match=r"n01.tar is damaged"):
        list(members(path, tmp_path))


def test_a_missing_tar_says_how_to_restore_it(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="dvc pull"):
        list(members(tmp_path / "train/n01.tar", tmp_path))
    with pytest.raises(StageError, match="dvc pull"):
        read_at(tmp_path / "train/n01.tar", 0, 1)


def test_a_disk_that_does_not_give_a_tar_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train/n01.tar", ("a.JPEG", b"x"))

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    for read in (
        lambda: read_at(path, 512, 1),
        lambda: list(members(path, tmp_path)),
        lambda: scan_tar(path, tmp_path, "b"),
    ):
        with pytest.raises(StageError, match=rf"{path} cannot be read: Input/output error"):
            read()
