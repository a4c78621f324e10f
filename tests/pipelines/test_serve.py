"""The version in force answers; whatever happens behind the front, no request is lost."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from starlette.requests import Request

from pipelines import serve
from pipelines.environment import settings
from pipelines.processes.servers import free_port
from pipelines.serve import Backend, Front, InForce
from stages.registry import logged_models, versions
from stages.registry.client import open_client
from stages.registry.versions import Version
from stages.runtime.command import StageError
from stages.runtime.files import sha256

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny"
IMAGE = {"inputs": {"image": ["aGVsbG8="]}}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An MLflow database of the test's own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def registered(answer: str) -> Version:
    """A version that answers this."""
    client = open_client()
    experiment = client.get_experiment_by_name("tiny")
    run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("tiny"))
    Path("model").mkdir(exist_ok=True)
    Path("model/answer.txt").write_text(answer)
    source = logged_models.log_model(
        run, Path(__file__).with_name("tiny_model.py"), Path("model"), {"name": "string"}, [], {}
    )
    return versions.create_version(NAME, "tiny", source, run.info.run_id, {}, "")


def test_what_was_known_holds_while_the_registry_is_gone(
    registry: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes: list[bool] = []
    in_force = InForce(NAME, 1, lambda: changes.append(True))
    in_force.ask()
    assert in_force.asked
    assert in_force.version is None
    assert "promote one" in in_force.said

    client = open_client()
    client.create_registered_model(NAME)
    client.create_model_version(NAME, str(registry))
    versions.set_alias(versions.list_versions(NAME)[0], "serving")
    in_force.ask()
    assert in_force.version
    assert in_force.version.number == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registry}/gone/mlflow.db")
    caplog.clear()
    in_force.ask()
    in_force.ask()
    assert in_force.version.number == 1
    assert len(caplog.records) == 1  # said once
    assert "does not answer" in caplog.text

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registry}/mlflow.db")
    versions.delete_alias(NAME, "serving")
    in_force.ask()
    assert in_force.version.number == 1
    assert "no version of tiny is in force any more" in in_force.said
    assert len(changes) == 5


def test_whatever_keeps_a_version_from_starting_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def no_space(*_: object) -> Path:
        nonlocal tries
        tries += 1
        raise OSError(28, "No space left on device")

    async def follow() -> None:
        front = Front(NAME, 1, tmp_path)
        front.in_force.version = Version(NAME, 1, "", "", {}, (), "", 0)
        following = asyncio.create_task(front._follow())
        until = time.monotonic() + 20
        while tries < 2 and not following.done() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        following.cancel()
        await front.close()

    monkeypatch.setattr(serve, "fetch", no_space)
    asyncio.run(follow())
    assert tries == 2
    assert "version 1: OSError: [Errno 28] No space left on device; NOTHING IS SERVED" in caplog.text


def test_a_line_of_any_length_does_not_end_the_reading(caplog: pytest.LogCaptureFixture) -> None:
    async def read() -> list[str]:
        script = "print('x' * 300_000); print('after it')"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
        lines: list[str] = []
        await serve._pass_on(process, "a version", lines)
        await process.wait()
        return lines

    assert asyncio.run(read())[-1] == "after it"


def test_headers_are_passed_on_as_they_came(tmp_path: Path) -> None:
    got: list[tuple[bytes, bytes]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        got.extend(request.headers.raw)
        return httpx.Response(200, text="ding")

    async def ask() -> None:
        front = Front(NAME, 1, tmp_path)
        front.client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        headers = [(b"x-user", "Zo\xeb".encode("latin-1")), (b"host", b"there")]
        scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b"", "headers": headers}
        response = await front._ask(Backend(3, 1, None), Request(scope), b"{}")  # type: ignore[arg-type]
        assert (response.status_code, response.headers["X-Model-Version"]) == (200, "3")
        await front.close()

    asyncio.run(ask())
    assert (b"x-user", b"Zo\xeb") in got
    assert b"there" not in dict(got).values()


def test_a_damaged_copy_of_a_model_is_downloaded_again(registry: Path) -> None:
    Path("model").mkdir()
    weights = Path("model/model.safetensors")
    weights.write_bytes(b"weights" * 100)
    version = registered("one")
    versions.finish_version(version, sha256(weights))
    version = versions.list_versions(NAME)[0]
    model = serve.fetch(version, registry / "store")
    (copy,) = model.rglob("model.safetensors")
    with copy.open("r+b") as content:
        content.truncate(10)
    assert serve.fetch(version, registry / "store") == model
    assert sha256(copy) == version.sha256
    assert (model / "MLmodel").exists()
    assert [path.name for path in (registry / "store").iterdir()] == [model.name]

    (held,) = (registry / "mlartifacts").rglob("model.safetensors")
    held.write_bytes(b"others")
    assert serve.fetch(version, registry / "store") == model  # the copy is sound
    copy.unlink()
    with pytest.raises(StageError, match="the registry holds other weights than those registered"):
        serve.fetch(version, registry / "store")


SERVER = """
import http.server, sys, time
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
time.sleep(0.5)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


@pytest.mark.parametrize("foreign", [True, False])
def test_another_process_that_takes_the_port_is_not_taken_for_the_model(foreign: bool) -> None:
    port = free_port(5800)

    async def start() -> asyncio.subprocess.Process:
        # As mlflow does it: the server is a child of the process that is started.
        launch = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SERVER!r}, '{port}'], check=True)"
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", launch, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    async def wait() -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            other = Backend(1, port, await start()) if foreign else None
            if other:
                await serve._wait_until_ready(other, client, [])
            backend = Backend(2, port, await start())
            lines: list[str] = []
            backend.reader = asyncio.create_task(serve._pass_on(backend.process, "version 2", lines))
            try:
                await serve._wait_until_ready(backend, client, lines)
            finally:
                for each in filter(None, (backend, other)):
                    await each.stop()

    if foreign:
        with pytest.raises(StageError, match=r"version 2 does not start: OSError.*Address already in use"):
            asyncio.run(wait())
    else:
        asyncio.run(wait())


# --------------------------------------------------------------------------------------------------- real processes


class Served:
    """`python -m pipelines.serve` in a checkout of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.log = root, free_port(5700), root / "log"
        for name in ("stages", "pipelines"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "environment.mk", root)
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params |= {"register": {"name": NAME}, "serve": {"host": "127.0.0.1", "port": self.port, "interval": 1}}
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        self.environment = {**os.environ, **settings(root)}
        self.environment.pop("PYTHONPATH", None)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.serve"], cwd=root, env=self.environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, pattern: str, times: int = 1) -> None:
        """Waits until the log has it as often as this."""
        for _ in range(1800):
            if len(re.findall(pattern, self.log.read_text())) >= times:
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise AssertionError(f"{pattern} is not in\n{self.log.read_text()}")

    def ask(self, params: dict[str, Any] | None = None) -> httpx.Response:
        """One request."""
        content = IMAGE | ({"params": params} if params else {})
        return httpx.post(f"http://127.0.0.1:{self.port}/invocations", json=content, timeout=300)

    def children(self) -> list[psutil.Process]:
        """The processes behind the front."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_model(self) -> None:
        """kill -9 of the process that has the model."""
        next(each for each in self.children() if "mlflow.pyfunc.scoring_server.app:app" in each.cmdline()).kill()


class Clients:
    """Four that ask again and again while this is open."""

    def __init__(self, served: Served) -> None:
        self.answers: Counter[tuple[str, str]] = Counter()
        self.lost: list[str] = []
        self._served, self._stopped = served, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def _ask(self) -> None:
        while not self._stopped.is_set():
            try:
                response = self._served.ask()
                response.raise_for_status()
                answer = response.json()["predictions"][0]["name"][0]
                self.answers[response.headers["X-Model-Version"], answer] += 1
            except (httpx.HTTPError, KeyError) as error:
                self.lost.append(repr(error))

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def served(registry: Path) -> Iterator[Served]:
    """Nothing is in force yet."""
    started = Served(registry)
    yield started
    left = [*started.children(), psutil.Process(started.process.pid)] if started.process.poll() is None else []
    for process in left:
        process.kill()
    started.process.wait()


@pytest.mark.slow
def test_no_request_is_lost_whatever_happens_behind_the_front(served: Served) -> None:
    one, two, broken = registered("one"), registered("two"), registered("broken")
    served.wait_for("no version of tiny is in force")
    assert served.ask().status_code == 503
    assert "promote one" in served.ask().json()["error"]

    versions.set_alias(one, "serving")
    served.wait_for("version 1 of tiny answers")
    with Clients(served) as clients:
        versions.set_alias(two, "serving")  # a swap
        served.wait_for("the process of version 1 has answered all it was asked, and ended")

        versions.set_alias(broken, "serving")  # one that does not start
        served.wait_for("version 3 does not start: ValueError: these weights are none; version 2 is served on")

        served.kill_model()  # while another is in force that does not start
        served.wait_for("version 2 of tiny answers", times=2)
        versions.set_alias(two, "serving")

        assert served.ask({"top_k": 666}).status_code == 502  # a request that kills whoever answers it
        served.wait_for("version 2 of tiny answers", times=5)
    assert clients.lost == []
    assert set(clients.answers) == {("1", "one"), ("2", "two")}

    assert httpx.get(f"http://127.0.0.1:{served.port}/ping").status_code == 200
    assert httpx.get(f"http://127.0.0.1:{served.port}/version").headers["X-Model-Version"] == "2"

    children = served.children()
    os.kill(served.process.pid, signal.SIGINT)
    assert served.process.wait() == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(registry: Path) -> None:
    first = Served(registry)
    try:
        first.wait_for("Ctrl-C stops it")
        second = first.root.parent / f"{first.root.name}-second"
        second.mkdir()
        shutil.copytree(first.root, second, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".synset", "log"))
        environment = {**os.environ, **settings(second)}
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.serve"], cwd=second, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert f"cannot listen on `serve` 127.0.0.1:{first.port}" in done.stderr
    finally:
        os.kill(first.process.pid, signal.SIGTERM)
        first.process.wait()
