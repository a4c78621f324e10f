"""Zips: read by member, and what is hostile, damaged or cut off is refused with one message."""

import hashlib
import io
import random
import struct
import warnings
import zipfile
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest

from stages.data.sources import zips
from stages.runtime.command import StageError
from tests.packing import contents, write

FILES = {f"train/{name}/{n}.jpg": random.Random(n).randbytes(900) for name in ("cat", "dog") for n in range(3)}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_methods(tmp_path: Path, method: int) -> None:
    write(tmp_path / "a.ZIP", zipped(FILES, method))
    assert contents("a.ZIP", tmp_path) == FILES


def test_forms_of_zips(tmp_path: Path) -> None:
    write(tmp_path / "a.zip", b"something before it" + zipped(FILES))
    assert contents("a.zip", tmp_path) == FILES
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as packed:  # streamed, with sizes behind the data and in 64 bits
        for name, data in FILES.items():
            with packed.open(name, "w", force_zip64=True) as file:
                file.write(data)
        packed.comment = b"a comment"
    assert contents("b.zip", tmp_path) == FILES
    write(tmp_path / "c.zip", zipped({"caf\u00e9/1.jpg": b"a", "dog/2.jpg": b"b", "empty/3.jpg": b""}))
    assert set(contents("c.zip", tmp_path)) == {"all/caf\u00e9/1.jpg", "all/dog/2.jpg", "all/empty/3.jpg"}
    write(tmp_path / "flat.zip", zipped({"1.jpg": b"a", "2.jpg": b"b"}))
    assert contents("flat.zip", tmp_path) == {"all//1.jpg": b"a", "all//2.jpg": b"b"}


def test_names_with_backslashes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name in ("cat/1.jpg", "dog/2.jpg"):
            info = zipfile.ZipInfo(name)
            info.create_system = 0
            packed.writestr(info, b"x")
    write(tmp_path / "a.zip", buffer.getvalue().replace(b"cat/1", b"cat\\1").replace(b"dog/2", b"dog\\2"))
    assert set(contents("a.zip", tmp_path)) == {"all/cat/1.jpg", "all/dog/2.jpg"}


def test_a_checksum(tmp_path: Path) -> None:
    data = zipped(FILES)
    write(tmp_path / "a.zip", data)
    assert contents(f"a.zip?sha256={hashlib.sha256(data).hexdigest()}", tmp_path) == FILES
    with pytest.raises(StageError, match=r"its md5 is .*, and the source says"):
        contents(f"a.zip?md5={'0' * 32}", tmp_path)


def odd(name: str = "train/cat/9.jpg", mode: int = 0, data: bytes = b"x") -> bytes:
    """A zip with one odd member."""
    buffer = io.BytesIO(zipped(FILES))
    with zipfile.ZipFile(buffer, "a") as packed:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.create_system = mode << 16, 3
        with warnings.catch_warnings(action="ignore"):  # of a name that comes twice
            packed.writestr(info, data)
    return buffer.getvalue()


def patched(field: int, value: bytes) -> bytes:
    """The first member of the directory with another field."""
    data = bytearray(zipped(FILES))
    place = data.index(b"PK\x01\x02") + field
    data[place : place + len(value)] = value
    return bytes(data)


ODD = {
    "out": (odd("../x.jpg"), "leads out"),
    "absolute": (odd("/etc/x.jpg"), "leads out"),
    "drive": (odd("C:/train/cat/x.jpg"), "leads out"),
    "link": (odd(mode=0o120777), "no plain file but a link"),
    "pipe": (odd(mode=0o010644), "a device or a pipe"),
    "control": (odd("train/cat/a\nb.jpg"), "control characters"),
    "twice": (odd("train/cat/1.jpg"), "is in it twice"),
    "encrypted": (patched(8, b"\x01\x00"), "is encrypted"),
    "method": (patched(10, b"\x09\x00"), "Deflate64"),
    "checksum": (patched(16, b"\0\0\0\0"), "its checksum is another"),
    "larger": (patched(24, struct.pack("<I", 2000)), "it has fewer bytes than it says"),
    "huge": (patched(24, struct.pack("<I", 2**31)), "expand more than 200-fold"),
    "elsewhere": (patched(42, struct.pack("<I", 7)), "not where the directory says"),
    "far": (patched(42, struct.pack("<I", 2**31)), "goes on into the directory"),
    "many parts": (zipped(FILES)[:-18] + b"\x02" + zipped(FILES)[-17:], "one of several parts"),
    "no zip": (b"<html>not found</html>", "is no zip"),
    "empty": (b"", "is no zip"),
    "without images": (zipped({"cat/a.txt": b"x"}), "holds no image"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_zips(tmp_path: Path, name: str) -> None:
    data, match = ODD[name]
    write(tmp_path / "a.zip", data)
    with pytest.raises(StageError, match=match) as refused:
        contents("a.zip", tmp_path)
    assert "a.zip" in str(refused.value) and str(refused.value).isprintable()


def test_overlapping_members_are_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = zipped({"train/cat/1.jpg": bytes(2**20)})
    monkeypatch.setattr(zips, "RATIO_FROM", 2**16)
    write(tmp_path / "a.zip", data)
    with pytest.raises(StageError, match="refused as a bomb"):
        contents("a.zip", tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = zipped(FILES)
    for length in range(0, len(data), 61):
        write(tmp_path / "a.zip", data[:length])
        with pytest.raises(StageError, match=r"a\.zip"):
            contents("a.zip", tmp_path)


def test_mutated_zips_are_read_or_refused(tmp_path: Path) -> None:
    draw, whole, ended = random.Random(3), zipped(FILES), {"read": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(whole)
        start = draw.choice([0, len(data) - 500])  # half of them in the directory
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(start, len(data))] = draw.randrange(256)
        write(tmp_path / "a.zip", bytes(data))
        try:
            found = contents("a.zip", tmp_path)
            assert sum(map(len, found.values())) <= len(data)
            ended["read"] += 1
        except StageError as error:
            assert str(error).isprintable(), error
            ended["refused"] += 1
    assert min(ended.values()) > 5


def test_a_zip_in_a_store(tmp_path: Path) -> None:
    """Read in parts, as a store sends them: a folder of archives, and one alone."""
    store = fsspec.filesystem("memory")
    for name in ("train", "test"):
        store.pipe(f"/zips/{name}.zip", zipped({f"{kind}/{n}.jpg": b"x" for kind in ("cat", "dog") for n in range(2)}))
    assert set(contents("memory://zips/train.zip")) == {
        f"all/{kind}/{n}.jpg" for kind in ("cat", "dog") for n in range(2)
    }
    assert {path.partition("/")[0] for path in contents("memory://zips")} == {"train", "test"}
    store.rm("/zips", recursive=True)
