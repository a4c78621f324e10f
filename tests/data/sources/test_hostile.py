"""Sources made to do harm, or damaged on the way: each is refused by name with one error, and nothing is written."""

import errno
import gzip
import io
import json
import os
import random
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from stages.data.sources import tars
from stages.data.sources.dispatch import read_source
from stages.data.sources.labels import safe_class
from stages.data.sources.parts import Group, SourceFile
from stages.runtime.command import StageError
from tests.packing import contents, odd_tar, parquet, tar_bytes, write
from tests.raw_tars import write_tar

GIB = 2**30


def header(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    """A member without bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


ODD_MEMBERS = {
    "parent": (header("../../x.jpg"), r"\.\./\.\./x\.jpg' leads out of the archive"),
    "parent inside": (header("set/train/../../../x.jpg"), "leads out of the archive"),
    "absolute": (header("/etc/x.jpg"), "'/etc/x.jpg' leads out"),
    "class named ..": (header("set/train/../x.jpg"), "leads out"),
    "folder outside": (header("../out", tarfile.DIRTYPE), "leads out"),
    "symbolic link": (
        header("set/train/cat/2.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        "2.jpg is no plain file but a link",
    ),
    "hard link": (header("set/train/cat/2.jpg", tarfile.LNKTYPE, "set/train/cat/1.jpg"), "a hard link to 'set/train"),
    "device": (header("set/train/cat/2.jpg", tarfile.CHRTYPE), "2.jpg is no plain file but a device"),
    "disk": (header("set/train/cat/2.jpg", tarfile.BLKTYPE), "a device"),
    "pipe": (header("set/train/cat/2.jpg", tarfile.FIFOTYPE), "a pipe"),
    "unknown kind": (header("set/train/cat/2.jpg", b"Z"), "something else"),
    "three gigabytes": (header("set/train/cat/big.JPEG", size=3 * GIB), r"big\.JPEG has 3\.0 GiB, and none may"),
    "not UTF-8": (header("set/train/cat/caf\udce9.jpg"), r"caf\\xe9\.jpg'.*not UTF-8"),
    "control characters": (header("set/train/cat/a\nb.jpg"), r"a\\nb\.jpg'.*control characters"),
    "escape sequence": (header("set/train/\x1b[2Jcat/b.jpg"), r"\\x1b\[2Jcat/b\.jpg'.*control characters"),
    "twice": (header("set/train/cat/1.jpg"), "train/cat/1.jpg is in it twice"),
    "twice, in disguise": (header("./set//train/./cat/1.jpg"), "train/cat/1.jpg is in it twice"),
    "long class": (header(f"set/train/{'x' * 201}/1.jpg"), "cannot name a class"),
    "longest name": (header(f"set/train/cat/{'x' * 5000}.jpg"), "the name has 5018 characters"),
}


@pytest.mark.parametrize("name", ODD_MEMBERS)
@pytest.mark.parametrize("packed", ["a.tar", "a.tgz"])
def test_odd_members(tmp_path: Path, name: str, packed: str) -> None:
    member, match = ODD_MEMBERS[name]
    data = odd_tar(member)
    write(tmp_path / packed, data if packed.endswith(".tar") else gzip.compress(data))
    with pytest.raises(StageError, match=match) as refused:
        contents(packed, tmp_path)
    assert packed in str(refused.value)
    assert str(refused.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == [packed]


def test_hidden_members_are_left_out_and_links_among_them_too(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", odd_tar(header("set/.git/x", tarfile.SYMTYPE, "/etc"), header("set/train/cat/._1.jpg")))
    assert contents("a.tar", tmp_path) == {"train/cat/1.jpg": b"one"}


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "/", "../../x", "a\\b", "a\nb", "x" * 201, "\u202e", " a"])
def test_odd_class_names_become_names_of_folders(tmp_path: Path, name: str) -> None:
    parquet(tmp_path / "a.parquet", [{"image": b"a", "label": name}])
    (found,) = contents("a.parquet", tmp_path)
    assert found == f"all/{safe_class(name) if name else ''}/a/000000"
    assert found.count("/") == 3 and "/../" not in found and found.isprintable() and len(found.encode()) < 230
    write(tmp_path / "a.tar", tar_bytes({"1.jpg": b"a", "1.json": json.dumps({"label": name}).encode()}))
    assert list(contents("a.tar", tmp_path)) == [f"all/{safe_class(name) if name else ''}/a/1.jpg"]


def test_the_same_name_twice(tmp_path: Path) -> None:
    write(tmp_path / "in/ILSVRC2012_img_train.tar", tar_bytes({"n01.tar": tar_bytes([("1.JPEG", b"a")] * 2)}))
    with pytest.raises(StageError, match=r"n01\.tar: 1\.JPEG is in it twice"):
        contents("in", tmp_path)
    write(tmp_path / "in/ILSVRC2012_img_train.tar", tar_bytes([("n01.tar", tar_bytes({"1.JPEG": b"a"}))] * 2))
    with pytest.raises(StageError, match=r"train\.tar: n01 is in it twice"):
        read_source("in", tmp_path)
    write(tmp_path / "tiny/wnids.txt", b"n01\n")
    write(tmp_path / "tiny/train/n01/images/1.JPEG", b"a")
    write(tmp_path / "tiny/val/images/v.JPEG", b"a")
    write(tmp_path / "tiny/val/val_annotations.txt", b"v.JPEG\tn01\t0\nv.JPEG\tn02\t0\n")
    with pytest.raises(StageError, match=r"line 2: v\.JPEG is in it twice"):
        read_source("tiny", tmp_path)


def test_a_large_file_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "in/cat/1.jpg", b"a")
    with (tmp_path / "in/cat/big.JPEG").open("wb") as file:
        file.truncate(3 * GIB)
    with pytest.raises(StageError, match=r"cat/big\.JPEG has 3\.0 GiB"):
        read_source("in", tmp_path)


def test_truncation_is_seen_wherever_it_is(tmp_path: Path) -> None:
    members = {f"set/train/cat/{n}.jpg": os.urandom(700) for n in range(3)}
    plain = tar_bytes(members)
    whole = contents(str(write(tmp_path / "whole.tar", plain)))
    for packed, name in ((plain, "a.tar"), (gzip.compress(plain), "a.tgz")):
        end = 3 * 1536 if name == "a.tar" else len(packed)  # what follows the last file is zeros alone
        for length in range(0, end, 37):
            write(tmp_path / name, packed[:length])
            with pytest.raises(StageError, match=r"a\.t"):
                contents(name, tmp_path)
    write(tmp_path / "a.tar", plain[: 3 * 1536 + 512])  # a lone block of zeros ends a tar too
    assert contents("a.tar", tmp_path) == whole


def test_a_damaged_header_does_not_end_a_tar_in_silence(tmp_path: Path) -> None:
    data = bytearray(tar_bytes({f"set/train/cat/{n}.jpg": b"x" for n in range(3)}))
    data[2 * 1024 + 150] ^= 1  # the checksum in the header of the last file
    write(tmp_path / "a.tar", bytes(data))
    with pytest.raises(StageError, match=r"damaged before byte \d+ \(it is cut or damaged at byte \d+\)"):
        contents("a.tar", tmp_path)


class Broken(io.BytesIO):
    """A file on a disk that fails."""

    def read(self, _: int | None = -1) -> bytes:
        """Fails."""
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group("train", "cat", [SourceFile("1.jpg", lambda: Broken(b"x"))])
    with pytest.raises(StageError, match=r"train/cat/1\.jpg cannot be read: Input/output error"):
        write_tar(group, tmp_path)
    with pytest.raises(StageError, match=r"^a\.tar cannot be read: Input/output error"):
        list(tars.members(Broken(), "a.tar"))


def test_a_file_that_claims_to_end_just_behind_its_section_is_refused() -> None:
    archive = tar_bytes({"1.jpg": bytes(3 * tars.CHUNK), "2.jpg": b"x"})
    for missing in range(1, 4):
        size = 512 + 3 * tars.CHUNK - missing
        outer = io.BytesIO(archive[:size] + bytes(10_000))
        with pytest.raises(StageError, match="damaged"):
            list(tars.members(tars.StreamSection(outer, 0, size), "class.tar"))
        assert outer.tell() < size + 1000


def test_odd_numbers_of_classes(tmp_path: Path) -> None:
    write(tmp_path / "names.txt", b"zero\none\n")
    for label, found in ((b"1", "one"), (b"-1", ""), (b"--1", "--1"), (b"0" * 30 + b"1", None), (b"7" * 5000, None)):
        write(tmp_path / "a.tar", tar_bytes({"1.jpg": b"x", "1.cls": label}))
        if found is None:
            with pytest.raises(StageError, match="none of the 2 class names"):
                contents("a.tar?class_names=names.txt", tmp_path)
        else:
            assert list(contents("a.tar?class_names=names.txt", tmp_path)) == [f"all/{found}/a/1.jpg"]


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "RATIO_FROM", 2**24)
    write(tmp_path / "a.tgz", gzip.compress(tar_bytes({f"set/train/cat/{n}.jpg": bytes(2**22) for n in range(9)})))
    with pytest.raises(StageError, match="expands more than 200-fold"):
        contents("a.tgz", tmp_path)
    write(tmp_path / "a.tgz", gzip.compress(tar_bytes({"set/train/cat/1.jpg": b"x"}) + bytes(2**27)))
    with pytest.raises(StageError, match=r"expands more than 200-fold|goes on after the end"):
        contents("a.tgz", tmp_path)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A tar that begins with an extended header."""
    info = header("x", kind, size=len(records))
    padded = records + bytes(-len(records) % 512)
    return info.tobuf(tarfile.USTAR_FORMAT) + padded + tar_bytes({"set/train/cat/1.jpg": b"x"})


@pytest.mark.parametrize(
    "data",
    [
        pax(b"9" * 2**15),
        pax(b"9" * 2**13),
        pax(b"12 size=-512\n"),
        pax(b"19 GNU.sparse.map=0,1\n" + b"25 GNU.sparse.name=../../x\n"),
        pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
        pax(b"19 hdrcharset=\xff\xff\n"),
        b"".join(header("x" * 99, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) for _ in range(9_000)),
        b"".join(header("x", tarfile.XGLTYPE).tobuf(tarfile.USTAR_FORMAT) for _ in range(9_000)),
        header("set/train/cat/1.jpg", size=-512).tobuf(tarfile.GNU_FORMAT) + bytes(1024),
    ],
)
def test_headers_that_would_hang_or_fill_the_memory(tmp_path: Path, data: bytes) -> None:
    write(tmp_path / "a.tar", data)
    with pytest.raises(StageError, match=r"a\.tar"):
        contents("a.tar", tmp_path)


# ----------------------------------------------------------------------------------------------------------------- fuzz


def jpeg(seed: int) -> bytes:
    """A small image."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (seed * 40 % 256, 90, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def seeds() -> list[bytes]:
    """Tars as four programs write them, and a tar of tars."""
    images = {f"set/train/{name}/{n}.jpg": jpeg(n) for n, name in enumerate(("cat", "dog", "é" * 60))}
    found = [
        odd_tar(header("set/train/cat/2.jpg", tarfile.SYMTYPE, "1.jpg")),
        tar_bytes({"n01.tar": tar_bytes(images)}),
    ]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, data in images.items():
                info = header(name if form != tarfile.USTAR_FORMAT else name[:60], size=len(data))
                info.pax_headers = {"SCHILY.xattr.user.x": "1", "mtime": "1.5"} if form == tarfile.PAX_FORMAT else {}
                tar.addfile(info, io.BytesIO(data))
        found.append(buffer.getvalue())
    return found


def flip(data: bytearray, draw: random.Random) -> None:
    """A few bytes become others."""
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] = draw.randrange(256)


def in_a_header(data: bytearray, draw: random.Random) -> None:
    """A field of a header becomes something else, and the header's checksum is made right."""
    start = 512 * draw.randrange(len(data) // 512)
    where, length = draw.choice([(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
    value = draw.choice(
        [b"\xff" * length, b"\x80" + b"\0" * (length - 1), b"7" * length, draw.randbytes(length), b"xLKgSD123456"]
    )
    data[start + where : start + where + length] = value[:length].ljust(length, b"\0")
    block = data[start : start + 512]
    total = 256 + sum(block[:148]) + sum(block[156:])
    data[start + 148 : start + 156] = b"%06o\0 " % total


def cut(data: bytearray, draw: random.Random) -> None:
    """It ends too early."""
    del data[draw.randrange(len(data)) :]


def moved(data: bytearray, draw: random.Random) -> None:
    """A block is there twice, or is gone."""
    start = 512 * draw.randrange(len(data) // 512)
    data[start : start + 512] = data[start : start + 512] * draw.choice([0, 2])


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [flip, in_a_header, in_a_header, cut, moved]


def fuzz(rounds: int, path: Path, seed: int) -> dict[str, int]:
    """Reads mutated archives as ingest does; how many were read and refused."""
    draw, originals = random.Random(seed), seeds()
    ended = {"read": 0, "refused": 0}
    for _ in range(rounds):
        data = bytearray(draw.choice(originals))
        for _ in range(draw.randint(1, 3)):
            if len(data) > 512:
                draw.choice(MUTATIONS)(data, draw)
        packed = bytearray(zlib.compress(bytes(data), 1, 31)) if draw.random() < 0.3 else data
        if packed is not data and draw.random() < 0.5:
            flip(packed, draw)
        path.write_bytes(packed)
        try:
            found = contents(str(path))
            assert sum(map(len, found.values())) <= len(data)
            ended["read"] += 1
        except StageError as error:
            assert str(error).isprintable(), error
            ended["refused"] += 1
    return ended


def test_mutated_archives_are_read_or_refused(tmp_path: Path) -> None:
    ended = fuzz(500, tmp_path / "a.tar", seed=1)
    assert min(ended.values()) > 50


@pytest.mark.parametrize("cell", [{"bytes": b"x" * 60, "path": "a.jpg"}, b"x" * 60])
def test_mutated_parquet_is_read_or_refused(tmp_path: Path, cell: Any) -> None:
    draw, ended = random.Random(4), {"read": 0, "refused": 0}
    original = parquet(tmp_path / "a.parquet", [{"image": cell, "label": n % 2} for n in range(8)], ["cat", "dog"])
    whole = original.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        flip(data, draw)
        original.write_bytes(data)
        try:
            contents(str(original))
            ended["read"] += 1
        except StageError as error:
            assert str(error).isprintable(), error
            ended["refused"] += 1
    assert min(ended.values()) > 10


@pytest.mark.slow
def test_many_mutated_archives_are_read_or_refused_and_memory_does_not_grow(tmp_path: Path) -> None:
    fuzz(2_000, tmp_path / "a.tar", seed=2)
    before = psutil.Process().memory_info().rss
    for seed in range(3, 8):
        ended = fuzz(5_000, tmp_path / "a.tar", seed)
        print(f"seed {seed}: {ended}")
        assert min(ended.values()) > 500
    assert psutil.Process().memory_info().rss - before < 32 * 2**20
