"""Remote sources give what the same files give on this machine; a connection that breaks is taken up again."""

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec  # type: ignore[import-untyped]
import pytest

from stages.data.sources import locations
from stages.data.sources.dispatch import read_source
from stages.runtime.command import StageError
from tests.packing import contents, kaggle_table, official, parquet, tar_bytes, write


def packed(folder: Path) -> list[str]:
    """A source of every kind below `folder`, and what to write for each."""
    files = {f"{split}/{name}/{n}.jpg": os.urandom(50) for split in ("train", "val") for name in "ab" for n in range(4)}
    for path, data in files.items():
        write(folder / "folder" / path, data)
    write(folder / "a.tgz", tar_bytes({f"top/{path}": data for path, data in files.items()}, "w:gz"))
    official(folder / "official")
    for path in ("train/n01/n01_1.JPEG", "val/v1.JPEG", "test/t1.JPEG"):
        write(folder / "kaggle/ILSVRC/Data/CLS-LOC" / path, path.encode())
    write(folder / "kaggle/LOC_val_solution.csv", kaggle_table({"v1.JPEG": "n01"}))
    write(folder / "tiny/wnids.txt", b"n01\n")
    write(folder / "tiny/train/n01/images/1.JPEG", b"a")
    write(folder / "tiny/val/images/v.JPEG", b"b")
    write(folder / "tiny/val/val_annotations.txt", b"v.JPEG\tn01\t0\n")
    for shard in ("train-0", "train-1"):
        parquet(folder / f"hf/data/{shard}.parquet", [{"image": os.urandom(99), "label": "a"} for _ in range(9)])
        write(folder / f"wds/{shard}.tar", tar_bytes({"1.jpg": os.urandom(9), "1.cls": b"0"}))
    write(folder / "names.txt", b"zero\n")
    write(folder / "flat/deep.jpg", b"x")
    shards = ["wds?class_names=names.txt", "wds/train-{0..1}.tar?class_names=names.txt", "hf/data/train-{0,1}.parquet"]
    return ["folder", "folder?images_per_class=2", "a.tgz", "official", "kaggle", "tiny", "hf", "flat", *shards]


def upload(folder: Path, url: str) -> None:
    """Copies a folder to any store."""
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.put(f"{folder}/", f"{path}/", recursive=True)


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder in fsspec's memory, empty before and after."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield "memory://bucket"
    filesystem.store.clear()


def test_every_kind_from_a_store(tmp_path: Path, bucket: str) -> None:
    sources = packed(tmp_path)
    upload(tmp_path, bucket)
    for source in [*sources, "hf/data/*.parquet", "wds/*.tar"]:
        assert contents(source, bucket) == contents(source, tmp_path), source
        assert len(contents(source, bucket)) > 0
    for source in sources:
        location, mark, query = source.partition("?")
        assert read_source(f"{bucket}/{source}", bucket).listing == read_source(source, bucket).listing
        if "class_names" not in query:
            assert contents(f"file://{tmp_path}/{location}{mark}{query}", "elsewhere") == contents(source, tmp_path)


def test_a_folder_made_in_the_console_of_s3_is_no_file(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.jpg", "a/deep/2.jpg", "b/3.jpg"):
        write(tmp_path / "pets" / name, b"x")
    upload(tmp_path, bucket)
    memory, find = fsspec.filesystem("memory"), fsspec.filesystem("memory").find

    def with_placeholders(path: str, **options: bool) -> dict[str, dict[str, Any]]:
        return find(path, **options) | {f"{each}/": {"size": 0, "type": "file"} for each in (path, f"{path}/deep")}

    monkeypatch.setattr(memory, "find", with_placeholders)
    assert contents("pets", bucket) == contents("pets", tmp_path)


def test_what_is_not_there(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(StageError, match=r"no such source: nowhere .*looked for the folder memory://bucket/nowhere"):
        read_source("nowhere", bucket)
    with pytest.raises(StageError, match=r"looked for the file memory://bucket/a\.tgz"):
        read_source("a.tgz", bucket)
    with pytest.raises(StageError, match="colour://x"):
        read_source("colour://x/y.tgz", tmp_path)


# ---------------------------------------------------------------------------------------------------------------- https


class Server(ThreadingHTTPServer):
    """Sends the files of a folder; as `breaks` says, some answers end in the middle."""

    def __init__(self, folder: Path, ranges: bool, breaks: int = 0) -> None:
        self.folder, self.ranges, self.breaks = folder, ranges, breaks
        self.sent: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        """Size and checksum."""
        self._answer(False)

    def do_GET(self) -> None:
        """The bytes."""
        self._answer(True)

    def _answer(self, with_body: bool) -> None:
        path = self.server.folder / unquote(self.path.partition("?")[0]).lstrip("/")
        if path.is_dir():
            names = [f"{each.name}/" if each.is_dir() else each.name for each in sorted(path.iterdir())]
            links = "".join(f'<a href="{self.path.rstrip("/")}/{name}">{name}</a>' for name in names)
            self._send(200, links.encode(), with_body, {"Content-Type": "text/html"})
        elif not path.is_file():
            self._send(404, b"", with_body, {})
        else:
            data = path.read_bytes()
            headers = {"ETag": hashlib.md5(data).hexdigest()}
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if found and self.server.ranges:
                start, end = int(found[1]), min(int(found[2]) + 1, len(data))
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
                self._send(206, data[start:end], with_body, headers)
            else:
                self._send(200, data, with_body, headers)

    def _send(self, status: int, data: bytes, with_body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.server.breaks and len(data) > 100_000:
            self.server.breaks -= 1
            data, self.close_connection = data[: len(data) // 2], True
        with suppress(ConnectionError):  # the reader has what it wanted
            self.wfile.write(data if with_body else b"")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A web server of `tmp_path`; a test may say that it sends no parts, or breaks."""
    server = Server(tmp_path, ranges=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_every_kind_from_a_web_server(tmp_path: Path, server: Server, ranges: bool) -> None:
    server.ranges = ranges
    to_and_fro = () if ranges else ("official", "hf")
    for source in packed(tmp_path):
        if source.startswith(to_and_fro):
            continue
        assert contents(source, server.url) == contents(source, tmp_path), source
    assert contents(f"{server.url}/a.tgz?download=1?seed=1") == contents("a.tgz", tmp_path)
    with pytest.raises(StageError, match=r"unknown download after the .* a URL that has a query of its own"):
        read_source(f"{server.url}/a.tgz?download=1", tmp_path)


def large(folder: Path) -> dict[str, bytes]:
    """An archive of several blocks."""
    files = {f"train/a/{n}.jpg": os.urandom(300_000) for n in range(30)}
    write(folder / "large.tgz", tar_bytes({f"top/{path}": data for path, data in files.items()}, "w:gz"))
    write(folder / "large.tar", tar_bytes({f"top/{path}": data for path, data in files.items()}))
    return files


@pytest.mark.parametrize("name", ["large.tgz", "large.tar"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    ranges: bool,
) -> None:
    files = large(tmp_path)
    checksum = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setattr(locations.time, "sleep", lambda _: None)
    server.ranges = ranges
    # Listed without a break: whether the server notices one in an answer that its reader has left depends on both.
    source = read_source(f"{server.url}/{name}?sha256={checksum}", tmp_path)
    server.breaks = 3
    with caplog.at_level("INFO"):
        assert contents(source) == files
    assert server.breaks == 0
    assert "trying again" in caplog.text


def test_a_connection_that_always_breaks_ends_in_one_message(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(tmp_path)
    monkeypatch.setattr(locations.time, "sleep", lambda _: None)
    server.breaks = 1_000
    with pytest.raises(StageError, match=r"large\.tgz: the connection broke .*Run the same command again"):
        contents(f"{server.url}/large.tgz")


def test_shards_that_are_read_to_and_fro_need_a_server_that_sends_parts(tmp_path: Path, server: Server) -> None:
    server.ranges = False
    parquet(tmp_path / "a.parquet", [{"image": os.urandom(9_000_000), "label": "a"}])
    with pytest.raises(StageError, match=r"a\.parquet: this server sends whole files only; download it"):
        contents(f"{server.url}/a.parquet")
    write(tmp_path / "in/ILSVRC2012_img_train.tar", tar_bytes({f"n0{n}.tar": bytes(5_000_000) for n in range(3)}))
    with pytest.raises(StageError, match=r"train\.tar: this server sends whole files only; download it"):
        contents("in", server.url)
