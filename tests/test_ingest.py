"""ingest: the same tars for any number of workers, killed or not; what was whole is never made again."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.data.raw.tars import members, raw_tars, read_at
from stages.data.sources import tar_writing
from stages.data.sources.digests import raw_digest, source_digest
from tests.closure import ROOT
from tests.packing import contents, official, parquet, tar_bytes, write

FAULTS = str(ROOT / "tests/faults")


class Checkout:
    """A folder in which ingest of the batch `new` runs."""

    def __init__(self, root: Path, source: str) -> None:
        self.root, self.raw = root, root / "data/raw/pretrain/new"
        self.name(source)

    def name(self, source: str) -> None:
        """Writes params.yaml."""
        self.root.mkdir(exist_ok=True)
        batches = {"new": {"role": "pretrain", "source": source}}
        (self.root / "params.yaml").write_text(yaml.safe_dump({"batches": batches}), encoding="utf-8")
        shutil.copy(ROOT / "dvc.yaml", self.root / "dvc.yaml")

    def ingest(self, fault: str = "", workers: int = 2) -> "subprocess.CompletedProcess[str]":
        """The stage; `fault` as tests/faults has it."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), FAULTS]),
            "SYNSET_FAULT": fault,
            "SYNSET_INCOMING": str(self.root.parent),
            "SYNSET_WORKERS": str(workers),
        }
        command = [sys.executable, "-m", "stages.ingest", "new"]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)

    def made(self) -> dict[str, str]:
        """Path of every file of the batch -> checksum."""
        files = [path for path in sorted(self.raw.rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.raw)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def whole(self) -> dict[str, tuple[int, int]]:
        """Every whole tar that a run which was killed left: path -> inode and time."""
        found = [path for path in (self.root / ".synset").rglob("*.tar") if not path.name.startswith(".")]
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    def contents(self) -> dict[str, bytes]:
        """What is in the raw tars."""
        return {
            member.path: read_at(tar, member.offset, member.size)
            for tar in raw_tars(self.raw)
            for member in members(tar, self.raw)
        }


def sources(folder: Path) -> dict[str, list[str]]:
    """A source of every kind, and the raw tars that it becomes."""
    files = {
        f"{split}/{name}/{n}.jpg": bytes([n]) for split in ("train", "val") for name in ("a", "b") for n in range(5)
    }
    for path, data in files.items():
        write(folder / "folder" / path, data)
    write(folder / "a.tgz", tar_bytes({f"top/{path}": data for path, data in files.items()}, "w:gz"))
    official(folder / "official")
    for shard in ("train-0", "train-1", "val-0"):
        rows = [{"image": bytes([n]), "label": "a" if n else None} for n in range(7)]
        parquet(folder / f"hf/{shard}.parquet", rows)
        samples = [{f"{n}.jpg": bytes([n]), f"{n}.cls": b"a"} for n in range(7)]
        write(folder / f"wds/{shard}.tar", tar_bytes([member for sample in samples for member in sample.items()]))
    for n in range(5):
        write(folder / f"flat/{n}.jpg", bytes([n]))
    classes = [f"{split}/{name}.tar" for split in ("train", "val") for name in ("a", "b")]
    mixed = [*(f"train-{n:05d}.tar" for n in range(4)), *(f"val-{n:05d}.tar" for n in range(4))]
    shards = [*(f"train-{n:05d}.tar" for n in range(4)), *(f"val-{n:05d}.tar" for n in range(2))]
    alone = [*(f"unlabelled/train-{n:05d}.tar" for n in range(2)), "unlabelled/val-00000.tar"]
    return {
        "folder": classes,
        "a.tgz": mixed,
        "official": ["train/n01.tar", "train/n02.tar", "val-00000.tar", "val-00001.tar"],
        "hf": sorted(shards + alone),
        "wds": [*(f"train-{n:05d}.tar" for n in range(6)), *(f"val-{n:05d}.tar" for n in range(3))],
        "flat": ["unlabelled/all-00000.tar", "unlabelled/all-00001.tar"],
        "folder?unlabelled=true": [f"unlabelled/{split}-{n:05d}.tar" for split in ("train", "val") for n in range(4)],
    }


def test_every_kind_becomes_the_same_tars_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_writing, "CUT_IMAGES", 3)
    # The constant is the module's, so ingest runs in this process.
    from stages.ingest import main

    monkeypatch.setattr(sys, "argv", ["ingest", "new"])
    monkeypatch.setenv("SYNSET_INCOMING", str(tmp_path))
    for number, (source, tars) in enumerate(sources(tmp_path).items()):
        made = []
        for workers in (1, 4):
            checkout = Checkout(tmp_path / f"{number}-{workers}", source)
            monkeypatch.setenv("SYNSET_WORKERS", str(workers))
            monkeypatch.chdir(checkout.root)
            main()
            assert checkout.contents() == contents(source, tmp_path)
            assert raw_digest(checkout.raw) == source_digest(source, tmp_path)
            assert not list((checkout.root / ".synset/work").rglob("*.*"))
            made.append(checkout.made())
        assert list(made[0]) == sorted([*tars, "source.json"])
        assert made[0] == made[1]


def test_a_raw_tar_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    import tarfile

    write(tmp_path / "pets/cat/2.jpg", b"b")
    write(tmp_path / "pets/cat/1.jpg", b"a")
    checkout = Checkout(tmp_path / "checkout", "pets")
    assert checkout.ingest().returncode == 0
    with tarfile.open(checkout.raw / "all/cat.tar") as tar:
        found = tar.getmembers()
    assert [member.name for member in found] == ["1.jpg", "2.jpg"]
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) for member in found} == {
        (0, 0, 0, "", "", 0o644)
    }


# ------------------------------------------------------------------------------------------------- killed, and going on


@pytest.fixture(params=["a.tgz", "shards", "folder"])
def many(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A source that becomes several tars, in one part or in several."""
    source = str(request.param)
    images = [(f"train/{'ab'[n % 2]}/{n}.jpg", f"image {n}".encode()) for n in range(3_500)]
    if source == "a.tgz":
        write(tmp_path / source, tar_bytes([(f"top/{path}", data) for path, data in images], "w:gz"))
    elif source == "shards":
        for shard in range(3):
            samples = [(f"{n}.jpg", f"{shard} {n}".encode()) for n in range(1_100)]
            members = [member for name, data in samples for member in ((name, data), (name[:-3] + "cls", b"a"))]
            write(tmp_path / f"shards/train-{shard}.tar", tar_bytes(members))
    else:
        for n, (_, data) in enumerate(images[:40]):
            write(tmp_path / f"folder/class{n % 8}/{n}.jpg", data)
    return source


def test_killed_again_and_again_it_ends_in_the_same_bytes_and_makes_no_whole_tar_again(
    tmp_path: Path, many: str
) -> None:
    undisturbed = Checkout(tmp_path / "undisturbed", many)
    assert undisturbed.ingest().returncode == 0
    checkout = Checkout(tmp_path / "killed", many)
    kills, whole = 0, checkout.whole()
    # A tar takes two renames and a part one: with two at work, the fifth never comes before one is whole.
    while (ended := checkout.ingest("kill stages.ingest os.rename .synset/work 5")).returncode:
        assert ended.returncode == -9, ended.stderr
        assert not checkout.raw.exists()
        left = checkout.whole()
        assert whole.items() <= left.items()
        kills, whole = kills + 1, left
        assert kills < 40
    print(f"{many}: {kills} kills")
    assert kills >= 1
    assert checkout.made() == undisturbed.made()
    inodes = {path.stat().st_ino for path in checkout.raw.rglob("*.tar")}
    assert {inode for inode, _ in whole.values()} <= inodes


def test_killed_while_it_is_put_in_place(tmp_path: Path, many: str) -> None:
    checkout = Checkout(tmp_path / "killed", many)
    for fault in ("kill stages.ingest os.rename data/raw 1", "kill stages.ingest shutil.rmtree .synset/work 1"):
        ended = checkout.ingest(fault)
        assert ended.returncode == -9, ended.stderr
        whole = checkout.whole()
        shutil.rmtree(checkout.raw, ignore_errors=True)  # as DVC does before it runs a stage
    assert checkout.ingest("kill stages.ingest os.rename .synset/work 1").returncode == 0, "nothing is made again"
    assert {path.stat().st_ino for path in checkout.raw.rglob("*.tar")} == {inode for inode, _ in whole.values()}
    assert not list(checkout.raw.parent.glob(".*"))
    assert not checkout.whole()


def test_a_full_disk(tmp_path: Path, many: str) -> None:
    checkout = Checkout(tmp_path / "full", many)
    ended = checkout.ingest("full stages.ingest os.rename .synset/work 5")
    assert ended.returncode == 1
    assert ended.stderr.count("error: ") == 1
    assert "no space left" in ended.stderr
    assert "Traceback" not in ended.stderr
    whole = checkout.whole()
    assert whole
    assert not list((checkout.root / ".synset").rglob(".*.part"))
    assert checkout.ingest().returncode == 0
    assert {inode for inode, _ in whole.values()} <= {path.stat().st_ino for path in checkout.raw.rglob("*.tar")}


def test_a_source_that_changed_is_read_anew(tmp_path: Path) -> None:
    images = [(f"top/train/a/{n}.jpg", f"image {n}".encode()) for n in range(2_500)]
    write(tmp_path / "a.tgz", tar_bytes(images, "w:gz"))
    checkout = Checkout(tmp_path / "checkout", "a.tgz")
    assert checkout.ingest("kill stages.ingest os.rename .synset/work 3").returncode == -9
    assert len(checkout.whole()) == 1
    write(tmp_path / "a.tgz", tar_bytes(images[1:], "w:gz"))
    assert checkout.ingest().returncode == 0
    assert checkout.contents() == contents("a.tgz", tmp_path)


def test_a_source_that_changed_in_secret_is_noticed(tmp_path: Path) -> None:
    images = [(f"top/train/a/{n}.jpg", f"image {n}".encode()) for n in range(2_500)]
    archive = write(tmp_path / "a.tar", tar_bytes(images))
    checkout = Checkout(tmp_path / "checkout", "a.tar")
    assert checkout.ingest("kill stages.ingest os.rename .synset/work 3").returncode == -9
    before = archive.stat()
    archive.write_bytes(archive.read_bytes().replace(b"image 17\0", b"image 71\0"))
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    ended = checkout.ingest()
    assert ended.returncode == 1
    assert "does not give the same images as before it was interrupted (train-00000.tar differs)" in ended.stderr
    assert not checkout.whole()
    assert checkout.ingest().returncode == 0
    assert checkout.contents() == contents("a.tar", tmp_path)


# ------------------------------------------------------------------------------------------------------------ refused


def test_of_a_wrong_checksum_nothing_is_kept(tmp_path: Path) -> None:
    images = [(f"top/train/a/{n}.jpg", f"image {n}".encode()) for n in range(1_500)]
    data = tar_bytes(images, "w:gz")
    write(tmp_path / "a.tgz", data)
    checkout = Checkout(tmp_path / "checkout", f"a.tgz?sha256={'0' * 64}")
    ended = checkout.ingest()
    assert ended.returncode == 1
    assert f"its sha256 is {hashlib.sha256(data).hexdigest()}, and the source says {'0' * 64}" in ended.stderr
    assert not checkout.whole()
    assert not (checkout.root / "data/raw").exists()


def test_a_class_that_no_image_of_a_stream_has(tmp_path: Path) -> None:
    write(tmp_path / "a.tgz", tar_bytes({"top/cat/1.jpg": b"a"}, "w:gz"))
    ended = Checkout(tmp_path / "checkout", "a.tgz?classes=cat,cow").ingest()
    assert ended.returncode == 1
    assert "the source has no class cow" in ended.stderr


def test_one_broken_part_ends_all_with_one_message(tmp_path: Path) -> None:
    for shard in range(6):
        data = tar_bytes({f"{n}.jpg": bytes(600) for n in range(50)})
        write(tmp_path / f"wds/train-{shard}.tar", data[: len(data) // 2] if shard == 3 else data)
    checkout = Checkout(tmp_path / "checkout", "wds")
    ended = checkout.ingest()
    assert ended.returncode == 1
    assert ended.stderr.count("error: ") == 1
    assert "train-3.tar" in ended.stderr
    assert "cut off" in ended.stderr
    assert not (tmp_path / "checkout/data").exists()


def test_nothing_is_written_outside_the_checkout(tmp_path: Path) -> None:
    write(tmp_path / "in/a.tar", tar_bytes({"top/train/cat/1.jpg": b"a", "../../x.jpg": b"b", "/tmp/x.jpg": b"c"}))
    before = sorted(path for path in tmp_path.rglob("*"))
    checkout = Checkout(tmp_path / "checkout", "in/a.tar")
    assert checkout.ingest().returncode == 1
    outside = [path for path in sorted(tmp_path.rglob("*")) if checkout.root not in (path, *path.parents)]
    assert outside == before
    record = json.dumps(sorted(str(path) for path in checkout.root.rglob("*") if path.is_file()))
    assert "x.jpg" not in record


def test_a_batch_to_fine_tune_on_has_labels(tmp_path: Path) -> None:
    write(tmp_path / "flat/1.jpg", b"a")
    checkout = Checkout(tmp_path / "checkout", "flat")
    params = checkout.root / "params.yaml"
    params.write_text(params.read_text().replace("pretrain", "finetune"))
    ended = checkout.ingest()
    assert ended.returncode == 1
    assert "source flat has no labels, and fine-tuning needs them: role: pretrain" in ended.stderr
    assert not (checkout.root / "data").exists()


def test_where_the_file_system_has_no_links_tars_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.ingest import main

    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    write(tmp_path / "a.tgz", tar_bytes({"top/cat/1.jpg": b"a"}, "w:gz"))
    checkout = Checkout(tmp_path / "checkout", "a.tgz")
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(sys, "argv", ["ingest", "new"])
    monkeypatch.setenv("SYNSET_INCOMING", str(tmp_path))
    monkeypatch.chdir(checkout.root)
    main()
    assert checkout.contents() == {"all/cat/1.jpg": b"a"}
    assert not checkout.whole()
