"""The version in force answers; whatever happens behind the front, no request is lost."""

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

from pipelines.environment import settings
from pipelines.processes.servers import free_port
from stages.registry import versions
from tests.pipelines.tiny_registry import NAME, registered

ROOT = Path(__file__).resolve().parents[2]
IMAGE = {"inputs": {"image": ["aGVsbG8="]}}


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
