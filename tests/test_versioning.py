"""A team passes data on through a DVC remote: what arrives is what was pushed, and a fresh batch moves only itself."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import yaml

from bench.versioning import OURS, Checkout, History, Remote, loose_history, passed_on, s3_server
from stages.data.sources.sample import draw
from stages.runtime.command import StageError
from tests.workspace import ROOT, Workspace

OF_VALIDATION = {"data/accepted", "data/quarantine.parquet", "data/classes", "reports/validation.html"}
OF_THE_BATCH = {"data/raw/finetune/fresh", "data/facts/finetune/fresh.parquet", "data/shards/finetune/fresh"}


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A checkout with the data stages of one batch, and in a later commit of a second, small one."""
    workspace = Workspace(tmp_path_factory.mktemp("author"))
    checkout, params, commits = Checkout(workspace.root, {"SYNSET_TRACKING": "off"}), workspace.params, []
    params["batches"] = {"base": {"role": "finetune", "source": "sample:target?seed=5&images_per_class=30"}}
    for name in ("base", "fresh"):
        workspace.write_params(params)
        ran = workspace.repro("shard")
        assert sorted(ran) == sorted([f"ingest@{name}", f"scan@{name}", "validate", f"shard@{name}"])
        commits.append(checkout.commit(name))
        params["batches"]["fresh"] = {"role": "finetune", "source": "sample:target?seed=6&images_per_class=2"}
    before, after = commits
    return History(checkout, before, after, ("--with-deps", "shard"))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, dict[str, str]]]:
    """An S3 server on this machine."""
    with s3_server() as found:
        yield found


@pytest.fixture(params=["directory", "S3"])
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, server: tuple[str, dict[str, str]], history: History
) -> tuple[Remote, History]:
    """An empty remote, and the history with the credentials for it."""
    if request.param == "directory":
        return Remote(str(tmp_path / "remote")), history
    endpoint, credentials = server
    return Remote(f"s3://team/{tmp_path.name}", endpoint), history.having(credentials)


def outputs(checkout: Checkout, commit: str) -> dict[str, str]:
    """md5 by path of the outputs in a commit's dvc.lock that DVC keeps."""
    lock = yaml.safe_load(checkout.run("git", "show", f"{commit}:dvc.lock"))
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", [])]
    return {out["path"]: out["md5"] for out in outs if out["path"] != "reports/validation.json"}


def objects(checkout: Checkout, commit: str) -> set[str]:
    """Names, as DVC's, of all objects that a commit needs: files, and lists of the files of a folder."""
    found = set()
    for md5 in outputs(checkout, commit).values():
        place = checkout.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        found |= {md5} | ({each["md5"] for each in json.loads(place.read_text())} if md5.endswith(".dir") else set())
    return found


def test_a_fresh_batch_changes_its_own_outputs_and_those_of_validation(history: History) -> None:
    before, after = outputs(history.checkout, history.before), outputs(history.checkout, history.after)
    changed = {path for path, md5 in after.items() if before.get(path) != md5}
    assert changed <= OF_VALIDATION | OF_THE_BATCH
    assert changed >= OF_THE_BATCH | {"data/accepted"}


def test_all_that_is_pushed_arrives_and_a_fresh_batch_moves_only_what_is_new(
    remote: tuple[Remote, History], tmp_path: Path
) -> None:
    place, history = remote
    # It compares the clone's data with the author's, file by file.
    moved = passed_on(history, place, tmp_path / "clone")
    old, new = objects(history.checkout, history.before), objects(history.checkout, history.after)
    arrived = {"".join(name.rsplit("/", 2)[1:]): size for name, size in place.contents().items()}
    assert set(arrived) == old | new
    assert moved["objects"] == len(old)
    assert moved["objects of the fresh 1 %"] == len(new - old)
    assert moved["MB of the fresh 1 %"] * 1e6 == pytest.approx(sum(arrived[name] for name in new - old))


def images(folder: Path, count: int) -> list[Path]:
    """So many files of the sample, in a folder a class."""
    found = []
    for file in islice(draw("target", 3, 40), count):
        split, class_name, name = file.path.split("/")
        found.append(folder / class_name / f"{split}-{name}")
        found[-1].parent.mkdir(parents=True, exist_ok=True)
        found[-1].write_bytes(file.data)
    return found


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A hundred loose files under DVC, the last of them in a later commit."""
    folder = tmp_path_factory.mktemp("loose")
    return loose_history(images(folder / "images", 100), folder / "checkout")


def test_loose_images_are_as_many_objects(loose: History, tmp_path: Path) -> None:
    moved = passed_on(loose, Remote(str(tmp_path / "remote")), tmp_path / "clone")
    assert 90 < moved["objects"] <= 100, "99 images, a few of them twice, and the list of the folder"
    assert moved["objects of the fresh 1 %"] == 2


def test_data_that_differs_from_what_was_pushed_is_an_error(
    loose: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = Checkout.data
    clone = tmp_path / "clone"
    monkeypatch.setattr(Checkout, "data", lambda it: contents(it) | ({"data/x": "0"} if it.root == clone else {}))
    with pytest.raises(StageError, match="differs from what was pushed"):
        passed_on(loose, Remote(str(tmp_path / "remote")), clone)


@pytest.mark.slow
def test_the_bench_itself(tmp_path: Path) -> None:
    images(tmp_path / "images", 100)
    command = [sys.executable, "-m", "bench.versioning", "--images", str(tmp_path / "images"), "--rounds", "1"]
    command += ["--json", str(tmp_path / "found.json")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert ended.stdout.splitlines()[-1] == found["summary"]
    assert len(found["tables"]) == 14
    assert all(OURS in {row["name"] for row in table["rows"]} for table in found["tables"])
    shutil.rmtree(tmp_path / "images")
