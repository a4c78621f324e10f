"""Deliveries in a store are found, read and watched like those in a folder; one that does not answer is an error."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest

from bench.versioning import s3_server
from pipelines.processes.stage_process import Stop
from pipelines.retrain import admission, steps
from pipelines.retrain.batch_list import with_batch
from pipelines.retrain.deliveries import FoundDeliveries, Memory, find_deliveries, remembered
from pipelines.retrain.due import nothing_new
from pipelines.retrain.incoming import LocalIncoming, UnreachableError, incoming_at
from pipelines.retrain.report import Report
from stages.data.sources.digests import raw_digest
from stages.data.sources.ingesting import ingest
from stages.params.batches import load_batch
from stages.params.retrain import Retrain
from stages.runtime.command import StageError
from stages.runtime.files import write_text
from tests.workspace import ROOT

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
RULES = "max_quarantined: 0.1"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of an S3 server on this machine, with the bucket `team`."""
    with s3_server() as (endpoint, _):
        yield endpoint


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """SYNSET_INCOMING as a URL of S3, empty."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it holds the endpoint of another test
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("SYNSET_INCOMING", f"s3://team/{tmp_path.name}/incoming/")
    return f"s3://team/{tmp_path.name}/incoming"


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return remembered(tmp_path / "memory.json")


def jpeg(number: int) -> bytes:
    """Bytes of their own; nothing decodes them here."""
    return b"jpeg %d" % number


def put(url: str, data: bytes = b"x") -> None:
    """Writes one object."""
    with fsspec.open(url, "wb") as file:
        file.write(data)


def deliver(store: str, name: str, ready: bool = True) -> None:
    """Two images of two classes."""
    for number, each in enumerate(("cat", "dog")):
        put(f"{store}/{name}/{each}/{number}.jpg", jpeg(number))
    if ready:
        put(f"{store}/{name}/_READY", b"")


def found(store: str, memory: Memory, batches: dict[str, Any] | None = None) -> FoundDeliveries:
    """A look, with the digests that the flow computes in a process of its own."""
    work = steps.Work(Retrain(), memory, Report(), Stop())
    return find_deliveries(store, batches or {}, [], RULES, memory, lambda name: steps.content_digest(work, name))


def test_a_delivery_in_s3_becomes_a_batch_with_the_digest_of_its_raw_data(
    store: str, memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(store, memory) == FoundDeliveries()
    deliver(store, "2026-11-23")
    deliver(store, "half", ready=False)
    put(f"{store}/notes.txt")
    put(f"{store}/.hidden/x.jpg")
    first = found(store, memory)
    assert [each.batch for each in first.ready] == ["d-2026-11-23"]
    assert list(first.left_alone) == ["half"] and not first.unreadable
    entry = first.ready[0].entry()
    for name in ("dvc.yaml", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_text(tmp_path / "params.yaml", with_batch(TEXT, "d-2026-11-23", entry))
    monkeypatch.chdir(tmp_path)  # as in the worktree of the flow
    monkeypatch.setenv("SYNSET_INCOMING", steps.stage_environment()["SYNSET_INCOMING"])
    ingest("d-2026-11-23", load_batch("d-2026-11-23"))
    assert raw_digest(tmp_path / "data/raw/finetune/d-2026-11-23") == entry["digest"]
    # Accepted, it is no news; and a change of it is seen.
    put(f"{store}/half/_READY", b"")
    again = found(store, memory, {"d-2026-11-23": entry})
    assert [each.batch for each in again.ready] == ["half"] and not again.left_alone
    put(f"{store}/2026-11-23/cat/9.jpg", jpeg(9))
    assert "changed after it was accepted" in found(store, memory, {"d-2026-11-23": entry}).left_alone["2026-11-23"]


def test_a_delivery_that_changes_while_it_is_read_is_left_alone(store: str, memory: Memory) -> None:
    deliver(store, "a")

    def read(name: str) -> str:
        put(f"{store}/{name}/cat/2.jpg")
        return "half of it"

    result = find_deliveries(store, {}, [], RULES, memory, read)
    assert "still being copied" in result.left_alone["a"] and memory.digests == {}


def test_any_store_and_file_urls(tmp_path: Path, memory: Memory) -> None:
    memory_store = fsspec.filesystem("memory")
    memory_store.store.clear()
    deliver("memory://bucket/in", "a")
    result = find_deliveries("memory://bucket/in", {}, [], RULES, memory, lambda name: "digest")
    assert [each.batch for each in result.ready] == ["a"]
    memory_store.store.clear()
    (tmp_path / "in/b").mkdir(parents=True)
    assert incoming_at(f"file://{tmp_path}/in").names() == ["b"]
    assert incoming_at("data/incoming", tmp_path) == LocalIncoming(tmp_path / "data/incoming")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://nobodys-bucket/incoming", "there is no `nobodys-bucket`"),
        ("s4://team/incoming", "SYNSET_INCOMING is s4://team/incoming: "),
    ],
)
def test_what_cannot_be_listed_is_an_error_and_not_nothing_to_do(
    store: str, memory: Memory, address: str, words: str
) -> None:
    with pytest.raises(UnreachableError, match=words) as error:
        found(address, memory)
    assert "\n" not in str(error.value)


def test_a_store_that_does_not_answer(store: str, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UnreachableError, match=r"incoming cannot be reached: Could not connect to the endpoint URL"):
        found(store, memory)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_the_flow_names_the_url_and_a_folder_that_is_not_mounted(
    store: str, tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Now:
        """Branches, as far as they are asked."""

        ahead, params, rules, policy, base, name = False, "batches: {}", RULES, Retrain(), "main", "retrain"

    monkeypatch.setattr(admission, "run_logger", logging.getLogger)
    work = steps.Work(Retrain(), memory, Report(), Stop())
    deliveries = admission.find_new(work, Now())  # type: ignore[arg-type]
    assert nothing_new(work, Now(), deliveries) == f"no new delivery in {store}"  # type: ignore[arg-type]
    monkeypatch.setenv("SYNSET_INCOMING", str(tmp_path / "not-mounted"))
    with pytest.raises(StageError, match="not-mounted, which is no folder"):
        admission.find_new(work, Now())  # type: ignore[arg-type]
    assert json.dumps(memory.refused) == "{}"
