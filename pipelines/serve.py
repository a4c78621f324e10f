"""The version in force, over HTTP: `python -m pipelines.serve` (`make serve`).

Each version answers in a process of its own (`mlflow models serve`); this front passes requests on to it. When another
version comes into force, its process is started beside the old one, takes over as soon as it answers, and the old one
ends once it has answered what it was asked. A request that finds no process waits for the next; none is lost.
"""

import argparse
import asyncio
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipelines import environment
from pipelines.processes.flow_lock import exclusive, folder
from pipelines.processes.servers import HOST, START_WITHIN, free_port, listening_socket
from pipelines.processes.stage_process import split_lines
from stages.params.all import check_all
from stages.params.register import Register
from stages.params.serve import Serve
from stages.registry import artifacts, versions
from stages.registry.versions import Version
from stages.runtime.command import StageError, run
from stages.runtime.files import replaced_directory
from stages.runtime.params_file import load_section

logger = logging.getLogger(__name__)

ALIAS = "serving"
CHILD_PORT = 5100
"""The first to try for the processes behind the front; they listen on 127.0.0.1 only."""
ATTEMPTS = 3
"""Processes that may die of one request before it is refused: predictions change nothing, so they may be repeated."""
HOPELESS = 3
"""Failed starts in a row, after which requests are refused instead of waiting for the next."""
PATIENCE = 300.0
"""Seconds that a request waits for a process to answer it."""
DRAIN = 120.0
"""Seconds for the old process to answer what it was asked: twice MLflow's own limit for a request."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries to start a version that does not start."""
# What is said of one connection, and not of the message.
_HOP_BY_HOP = {"connection", "content-length", "date", "host", "keep-alive", "server", "te", "trailer"}
_HOP_BY_HOP |= {"transfer-encoding", "upgrade", "accept-encoding", "expect"}


# --------------------------------------------------------------------------------------------- one version's process


@dataclass(eq=False)
class Backend:
    """The process of a version, and the requests that it is answering."""

    version: int
    port: int
    process: asyncio.subprocess.Process
    in_flight: int = 0
    reader: "asyncio.Task[None] | None" = None

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self.process.returncode is not None

    async def stop(self) -> None:
        """Ends the process with all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), timeout=10)


async def start_backend(version: int, model: Path, client: httpx.AsyncClient) -> Backend:
    """A process that serves the model in a folder; it answers when this returns.

    Raises:
        StageError: it ended, or did not answer in time.
    """
    port = free_port(CHILD_PORT)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(model), "--env-manager", "local"]
    process = await asyncio.create_subprocess_exec(
        *command, "--host", HOST, "--port", str(port),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "UVICORN_LOG_LEVEL": "warning"},
        start_new_session=True,
    )  # fmt: skip
    backend = Backend(version, port, process)
    lines: list[str] = []
    backend.reader = asyncio.create_task(_pass_on(process, f"version {version}", lines))
    try:
        await _wait_until_ready(backend, client, lines)
    except BaseException:
        await backend.stop()
        raise
    return backend


async def _wait_until_ready(backend: Backend, client: httpx.AsyncClient, lines: list[str]) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + START_WITHIN
    while loop.time() < until:
        if backend.ended:
            assert backend.reader
            await asyncio.wait({backend.reader}, timeout=5)
            raise StageError(f"version {backend.version} does not start: {_cause(lines)}")
        with suppress(httpx.TransportError):
            answers = (await client.get(f"http://{HOST}:{backend.port}/ping")).is_success
            # The port was free when it was chosen; by now another process may have it, and another model answer.
            if answers and _listens(backend):
                return
        await asyncio.sleep(0.2)
    raise StageError(f"version {backend.version} did not answer within {START_WITHIN:.0f} s")


def _listens(backend: Backend) -> bool:
    """Whether it is our process, or one that it started, that has the port."""
    with suppress(psutil.Error):
        own = psutil.Process(backend.process.pid)
        connections = [each for process in (own, *own.children(True)) for each in process.net_connections("tcp")]
        return any(each.status == psutil.CONN_LISTEN and each.laddr.port == backend.port for each in connections)
    return False  # one of them has ended


def _cause(lines: list[str]) -> str:
    """The first error of a traceback: the last is only that of the process around it."""
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (errors or lines[-1:] or ["it said nothing"])[0]


async def _pass_on(process: asyncio.subprocess.Process, name: str, lines: list[str]) -> None:
    assert process.stdout is not None
    while line := await _line(process.stdout):
        for shown in split_lines([line]):
            lines[:] = [*lines[-199:], shown]
            logger.info("%s | %s", name, shown)


async def _line(stream: asyncio.StreamReader) -> bytes:
    """Empty at the end. Whatever comes is read: a process whose output nobody reads stands still."""
    try:
        return await stream.readline()
    except ValueError:  # longer than the reader's buffer, which asyncio has emptied
        return b"(a line too long to be shown)\n"


# ---------------------------------------------------------------------------------------------------------- registry


@dataclass
class InForce:
    """What the registry says, asked again and again in a thread: it may hang, and no request waits for it."""

    name: str
    interval: float
    changed: Callable[[], None]
    version: Version | None = None
    """The version in force, as far as is known."""
    asked: bool = False
    said: str = field(default="", init=False)
    """What was said last of its being no version, or no registry."""

    def follow(self) -> None:
        """Asks for ever; in a thread that does not keep the process alive."""
        ended = threading.Event()
        while not ended.wait(self.interval if self.asked else 0):
            self.ask()

    def ask(self) -> None:
        """Asks once. While nobody answers, what was known holds."""
        try:
            found = versions.version_by_alias(self.name, ALIAS)
        except Exception as error:  # whatever the registry's client raises, what is served goes on being served
            self._say(f"warning: the registry does not answer ({type(error).__name__}: {error}); asking again")
        else:
            if found is None and self.version:
                self._say(f"warning: no version of {self.name} is in force any more; serving the last one on")
            elif found is None:
                self._say(f"no version of {self.name} is in force; promote one in the MLflow UI (alias `champion`)")
            else:
                self.said = ""
                self.version = found
        self.asked = True
        self.changed()

    def _say(self, message: str) -> None:
        if message != self.said:
            logger.warning(message)
        self.said = message


def fetch(version: Version, store: Path) -> Path:
    """The model of a version in a folder of its own below `store`, downloaded where it is not there as registered.

    A process that dies can so be started again while the registry is gone.

    Raises:
        StageError: it cannot be downloaded, or the registry holds other weights than those registered.
    """
    model = store / f"{version.name}-{version.number}-{version.source.rpartition('/')[2]}"
    if model.exists() and _is_registered(version, model):
        return model
    with replaced_directory(model) as aside:
        artifacts.download_model(version, aside)
        if not _is_registered(version, aside):
            raise StageError(f"version {version.number}: the registry holds other weights than those registered")
    return model


def _is_registered(version: Version, model: Path) -> bool:
    """By its weights, where the version says which; a copy may be cut short by a power cut, or damaged later."""
    return not version.sha256 or artifacts.weights_sha256(model) == version.sha256


def _forget(store: Path, keep: Path) -> None:
    for each in store.iterdir():
        if each != keep and each.is_dir():
            shutil.rmtree(each, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- front


class Front:
    """Passes requests on to the process of the version in force, and sees that there is one."""

    def __init__(self, name: str, interval: float, store: Path) -> None:
        self.store = store
        self.client = httpx.AsyncClient(
            # A connection a request: one that is kept may be closed by the other side at the very moment it is used.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            timeout=httpx.Timeout(None, connect=30),
            trust_env=False,
        )
        self.backend: Backend | None = None
        self.old: set[Backend] = set()
        self.there = asyncio.Condition()
        self.suspects = asyncio.Lock()
        self.wake = asyncio.Event()
        self.good: Version | None = None
        """The last version that answered."""
        self.failed: dict[int, tuple[int, float]] = {}
        """Versions that did not start: how often in a row, and when to try again."""
        self.tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        self.in_force = InForce(name, interval, lambda: _call(loop, self.wake.set))

    def begin(self) -> None:
        """From now on the version in force is served."""
        threading.Thread(target=self.in_force.follow, daemon=True).start()
        self._spawn(self._follow())

    async def close(self) -> None:
        """Ends all processes."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for backend in [self.backend, *self.old]:
            if backend:
                await backend.stop()
        await self.client.aclose()

    async def answer(self, request: Request) -> Response:
        """The answer of the version in force; the header X-Model-Version says which. 503 while there is none."""
        body = await request.body()
        if response := await self._try(request, body):
            return response
        # The process died of this request, or of another that it was asked at the same time. So that none is blamed
        # for another's doing, those that it may have died of are asked one after another.
        async with self.suspects:
            for _ in range(ATTEMPTS - 1):
                if response := await self._try(request, body):
                    return response
        return JSONResponse({"error": f"the model's process broke off its answer, {ATTEMPTS} times in a row"}, 502)

    async def _try(self, request: Request, body: bytes) -> Response | None:
        """None where the process ended before it had answered."""
        backend = await self._taken()
        if backend is None:
            return self._none()
        try:
            return await self._ask(backend, request, body)
        except httpx.TransportError:
            with suppress(TimeoutError):  # its end is seen in a moment
                await asyncio.wait_for(backend.process.wait(), timeout=5)
            return None
        finally:
            backend.in_flight -= 1

    async def _ask(self, backend: Backend, request: Request, body: bytes) -> Response:
        url = f"http://{HOST}:{backend.port}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        # As bytes, as they came: httpx would take nothing but ASCII in text.
        headers = [(key, value) for key, value in request.headers.raw if key.decode("latin-1") not in _HOP_BY_HOP]
        got = await self.client.request(request.method, url, content=body, headers=headers)
        kept = {key: value for key, value in got.headers.items() if key not in _HOP_BY_HOP}
        return Response(got.content, got.status_code, kept | {"X-Model-Version": str(backend.version)})

    async def _taken(self) -> Backend | None:
        """The process to ask, counted as asked; waits for it where there will be one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE), self.there:
                await self.there.wait_for(lambda: self.backend or self._hopeless())
        if self.backend:
            self.backend.in_flight += 1
        return self.backend

    def _hopeless(self) -> bool:
        """Nobody knows of a version to start, or it did not start again and again."""
        if version := self.good or self.in_force.version:
            return self.failed.get(version.number, (0, 0.0))[0] >= HOPELESS
        return self.in_force.asked

    def _none(self) -> Response:
        known = self.in_force.version
        why = f"version {known.number} does not start; see the log" if known else self.in_force.said
        return JSONResponse({"error": why}, 503, {"Retry-After": "10"})

    async def _follow(self) -> None:
        """Serves what is in force, for ever."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), timeout=1)
            self.wake.clear()
            async with self.there:
                self.there.notify_all()  # who waits may learn that there is nothing to wait for
            if version := self._due():
                try:
                    await self._switch(version)
                except Exception as error:  # a full disk, a database that is locked: whatever it is, it is tried again
                    self._count_failure(version.number, error)

    def _due(self) -> Version | None:
        """The version to start now, if any."""
        wanted, now = self.in_force.version, time.monotonic()
        # Where nothing answers, the last that did comes first: another one may never start.
        candidates = [wanted] if self.backend else [self.good, wanted]
        for each in candidates:
            running = self.backend is not None and each is not None and self.backend.version == each.number
            if each and not running and now >= self.failed.get(each.number, (0, 0.0))[1]:
                return each
        return None

    async def _switch(self, wanted: Version) -> None:
        logger.info("serve: starting version %d of %s", wanted.number, wanted.name)
        model = await asyncio.to_thread(fetch, wanted, self.store)
        new = await start_backend(wanted.number, model, self.client)
        async with self.there:
            old, self.backend = self.backend, new
            self.there.notify_all()
        self.good = wanted
        self.failed.pop(wanted.number, None)
        self._spawn(self._watch(new))
        logger.info("serve: version %d of %s answers", wanted.number, wanted.name)
        _forget(self.store, model)
        if old:
            self.old.add(old)
            self._spawn(self._drain(old))

    def _count_failure(self, number: int, error: Exception) -> None:
        times = self.failed.get(number, (0, 0.0))[0] + 1
        pause = min(2.0**times, LONGEST_PAUSE)
        self.failed[number] = (times, time.monotonic() + pause)
        on = f"version {self.backend.version} is served on" if self.backend else "NOTHING IS SERVED"
        why = error if isinstance(error, StageError) else f"version {number}: {type(error).__name__}: {error}"
        logger.error("error: %s; %s; trying again in %.0f s", why, on, pause)

    async def _watch(self, backend: Backend) -> None:
        await backend.process.wait()
        if self.backend is backend:
            logger.warning("warning: the process of version %d ended; starting it again", backend.version)
            self.backend = None
            self.wake.set()
            await backend.stop()  # what it left of its group

    async def _drain(self, old: Backend) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN):
                while old.in_flight:
                    await asyncio.sleep(0.05)
        await old.stop()
        self.old.discard(old)
        logger.info("serve: the process of version %d has answered all it was asked, and ended", old.version)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def _call(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(what)


# -------------------------------------------------------------------------------------------------------------- main


class _Server(uvicorn.Server):
    """Without uvicorn's own signal handlers: they would raise the signal again before the processes are ended."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


async def serve(name: str, params: Serve, listening: socket.socket, store: Path) -> None:
    """Serves the version in force of the model `name` until SIGINT or SIGTERM; what was asked is answered first."""
    front = Front(name, params.interval, store)
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    app = Starlette(routes=[Route("/{path:path}", front.answer, methods=methods)])
    server = _Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=30))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)
    front.begin()
    try:
        await server.serve(sockets=[listening])
    finally:
        await front.close()


def main() -> None:
    """Serves until Ctrl-C, at `serve.host` and `serve.port`."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    check_all()
    environment.apply()
    name, params = load_section("register", Register).name, load_section("serve", Serve)
    # A registry that is gone is found out soon, and asked again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with exclusive("serve"):
        try:
            listening = listening_socket(params.host, params.port)
        except OSError as error:
            raise StageError(f"params.yaml: cannot listen on `serve` {params.host}:{params.port}: {error}") from None
        logger.info("serve: http://%s:%d/invocations; Ctrl-C stops it", params.host, params.port)
        with listening:
            asyncio.run(serve(name, params, listening, folder("serve") / "models"))


if __name__ == "__main__":
    run(main)
