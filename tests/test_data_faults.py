"""Ingest, scan and shard killed again and again: the end is the same to the byte, and nothing finished is done twice.

Every run but the first is the recovery from the kill before it, and is killed further on. Some kills hit the stage's
own process, some one of its workers (both inside renames), some the whole process group at a moment that chance picks.
The log (`pytest -s`) lists them by phase.
"""

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from stages.data.raw.facts import ACCEPTED
from stages.runtime.tables import read_table, write_table
from tests.workspace import ROOT, Workspace

pytestmark = pytest.mark.slow
FAULTS = str(ROOT / "tests/faults")
BATCH = "many"
SOURCES = {"folder": "classes", "stream": "shards"}
"""A folder of classes, and tars in which the classes are mixed."""


class Kill(NamedTuple):
    """Right before the nth event in whose arguments TEXT occurs."""

    stage: str
    event: str
    text: str
    nth: int


KILLS = {
    "folder": [
        Kill("ingest", "open", ".class.tar", 2),
        Kill("ingest", "os.rename", ".class.tar.part", 2),
        Kill("ingest", "os.rename", "class.tar", 7),
        Kill("ingest", "os.rename", "done.json", 3),
        Kill("ingest", "os.link", "class.tar", 4),
        Kill("ingest", "os.rename", "data/raw", 1),
        Kill("scan", "open", ".parquet", 1),
        Kill("scan", "os.rename", ".parquet", 2),
        Kill("scan", "os.rename", ".parquet", 3),
        Kill("scan", "os.rename", "data/facts", 1),
        Kill("shard", "os.rename", "plan/", 2),
        Kill("shard", "os.rename", ".tar", 3),
        Kill("shard", "os.rename", "entries/", 1),
        Kill("shard", "os.rename", "entries/", 2),
        Kill("shard", "os.rename", "shards/", 2),
        Kill("shard", "os.rename", "index.json", 1),
        Kill("shard", "os.rename", "data/shards", 1),
    ],
    "stream": [
        Kill("ingest", "open", "train-00001.tar", 1),
        Kill("ingest", "os.rename", "train-00000.tar", 2),
        Kill("ingest", "os.rename", "done.json", 1),
        Kill("ingest", "os.link", "train-00001.tar", 1),
        Kill("ingest", "os.rename", "data/raw", 1),
        Kill("scan", "os.rename", ".parquet", 1),
        Kill("scan", "os.rename", "data/facts", 1),
        Kill("shard", "os.rename", "entries/", 1),
        Kill("shard", "os.rename", "data/shards", 1),
    ],
}
OUTPUTS = {
    "ingest": f"data/raw/pretrain/{BATCH}",
    "scan": f"data/facts/pretrain/{BATCH}.parquet",
    "shard": f"data/shards/pretrain/{BATCH}",
}
BY_CHANCE = 4
"""Kills of the whole process group, of each stage."""


@pytest.fixture(scope="module")
def incoming(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn sample as a folder of classes, and again as tars of mixed samples of 1,100 images and more."""
    from stages.data.sources.sample import draw

    folder = tmp_path_factory.mktemp("incoming")
    files = [file for file in draw("upstream", 3, 60) if file.path.startswith("train/")]
    for file in files:
        path = folder / SOURCES["folder"] / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
    (folder / SOURCES["stream"]).mkdir()
    random.Random(1).shuffle(files)
    for number in range(3):
        with tarfile.open(folder / SOURCES["stream"] / f"some-train-{number:06d}.tar", "w") as tar:
            for place, file in enumerate(files * 2):
                put(tar, f"{place:06d}.jpg", file.data, folder)
                put(tar, f"{place:06d}.cls", file.path.split("/")[1].encode(), folder)
    return folder


def put(tar: tarfile.TarFile, name: str, data: bytes, folder: Path) -> None:
    """A file into a tar."""
    path = folder / "one"
    path.write_bytes(data)
    tar.add(path, name)
    path.unlink()


def checkout(folder: Path, kind: str, incoming: Path) -> Workspace:
    """A checkout with one batch."""
    folder.mkdir()
    workspace = Workspace(folder, SYNSET_INCOMING=str(incoming), SYNSET_WORKERS="2")
    params = workspace.params
    params["batches"] = {BATCH: {"role": "pretrain", "source": SOURCES[kind]}}
    workspace.write_params(params)
    return workspace


def stage(workspace: Workspace, name: str, fault: str = "", seconds: float | None = None) -> int:
    """Runs a stage, killed by a fault or as a whole group after some seconds; its exit code."""
    environment = workspace.environment | ({"PYTHONPATH": FAULTS, "SYNSET_FAULT": fault} if fault else {})
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}", BATCH], cwd=workspace.root, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if seconds is not None:
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
    _, said = process.communicate()
    assert fault or seconds is not None or not process.returncode, said
    came = f"fault: {fault.split()[0]}" in said if fault else True
    if name == "scan":  # its own processes have nobody to say it to: it tells of their death
        came = came or ("the process that scanned" in said and "was killed by SIGKILL" in said)
    if not came:
        pytest.fail(f"{fault} did not come: {said}")
    return process.returncode


def accept(workspace: Workspace) -> None:
    """All that decode, for training: validate would find the repeated ones."""
    facts = read_table(workspace.root / f"data/facts/pretrain/{BATCH}.parquet")
    names = sorted(facts["class_name"].unique())
    split = ["test" if number % 5 == 0 else "train" for number in range(len(facts))]
    labels = facts["class_name"].map(names.index).astype("int32")
    accepted = facts.assign(split=split, label=labels)[facts["decodes"]]
    write_table(accepted, ACCEPTED, workspace.root / f"data/accepted/pretrain/{BATCH}.parquet")


def finished(workspace: Workspace, name: str) -> dict[str, tuple[int, int]]:
    """Whole files of the work in progress, by inode and time of writing: tars, facts of pieces, shards, entries."""
    found = {}
    for path in (workspace.root / f".synset/work/{name}@{BATCH}").rglob("*"):
        hidden = any(part.startswith(".") for part in path.parts[path.parts.index("work") :])
        if path.is_file() and not hidden and not {"aside", "plan", "probe"} & set(path.parts):
            found[str(path)] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def made(workspace: Workspace, name: str) -> int:
    """When the stage's output got its name, in ns; 0: it has none."""
    path = workspace.root / OUTPUTS[name]
    return path.stat().st_ctime_ns if path.exists() else 0


def kept(workspace: Workspace, name: str, before: dict[str, tuple[int, int]], done: bool) -> int:
    """How much of `before` is still there; all that is must be the same files, never written again.

    Only where the output has been made since (`done`) may any be gone: into it, or thrown away with the rest.
    """
    after = finished(workspace, name)
    # A shard is whole with its entry, which comes last; what has none yet may be written again.
    whole = {each for each in before if name != "shard" or entry_of(each) in before}
    there = whole & set(after)
    assert {each: before[each] for each in there} == {each: after[each] for each in there}
    assert done or there == whole, sorted(whole - there)
    return len(there)


def entry_of(path: str) -> str:
    """The entry of a shard's file."""
    shard = Path(path)
    return str(shard.parents[1] / "entries" / f"{shard.stem}.json")


def contents(workspace: Workspace) -> dict[str, bytes]:
    """All bytes of what the stages wrote."""
    folders = [workspace.root / "data" / kind / "pretrain" for kind in ("raw", "facts", "shards")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(workspace.root)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kind", list(SOURCES))
def test_killed_anywhere_the_end_is_the_same(kind: str, incoming: Path, tmp_path: Path) -> None:
    undisturbed = checkout(tmp_path / "undisturbed", kind, incoming)
    killed = checkout(tmp_path / "killed", kind, incoming)
    chance, number = random.Random(7), 0
    for name in ("ingest", "scan", "shard"):
        if name == "shard":
            accept(undisturbed)
            accept(killed)
        began = time.perf_counter()
        stage(undisturbed, name)
        seconds = time.perf_counter() - began
        moments = [f"kill stages.{name} {each.event} {each.text} {each.nth}" for each in KILLS[kind] if each[0] == name]
        for faults in ([""] * BY_CHANCE, moments):  # apart: those by chance may leave nothing to do for the others
            already = made(killed, name)
            for fault in faults:
                number += 1
                before = finished(killed, name)
                after = chance.uniform(0.2, 1.0) * seconds
                ended = stage(killed, name, fault) if fault else stage(killed, name, seconds=after)
                count = kept(killed, name, before, done=made(killed, name) != already)
                moment = fault.removeprefix("kill ") or f"stages.{name}, the group after {after:.1f} s"
                print(f"{number:>2}  {moment}: ended with {ended}, {count} of {len(before)} finished files kept")
            stage(killed, name)
            assert not list((killed.root / ".synset/work").glob(f"{name}@{BATCH}/*"))
            assert contents(killed) == contents(undisturbed)
    assert not [path for path in (killed.root / "data").rglob(".*") if path.name != ".gitkeep"]
