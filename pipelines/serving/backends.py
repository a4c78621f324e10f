"""The process that serves one version: its model is downloaded, `mlflow models serve` is started, and ended with all
that it started.
"""

import asyncio
import logging
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from pipelines.processes.servers import HOST, START_WITHIN, free_port
from pipelines.processes.stage_process import split_lines
from stages.registry import artifacts
from stages.registry.versions import Version
from stages.runtime.command import StageError
from stages.runtime.files import replaced_directory
from stages.runtime.processes import end_group

logger = logging.getLogger(__name__)

FIRST_PORT = 5100
"""The first to try for a backend; backends listen on 127.0.0.1 only."""


@dataclass(eq=False)
class Backend:
    """The process of a version, and the number of requests that it is answering."""

    version: int
    port: int
    process: asyncio.subprocess.Process
    in_flight: int = 0
    reader: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self.process.returncode is not None

    async def stop(self) -> None:
        """Ends the process with all that it started."""
        await asyncio.to_thread(end_group, self.process.pid, lambda: self.process.returncode, grace=10)


async def start_backend(version: int, model: Path, client: httpx.AsyncClient) -> Backend:
    """A process that serves the model in a folder; it answers when this returns.

    Raises:
        StageError: it ended, or did not answer in time.
    """
    port = free_port(FIRST_PORT)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(model), "--env-manager", "local"]
    process = await asyncio.create_subprocess_exec(
        *[*command, "--host", HOST, "--port", str(port)],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "UVICORN_LOG_LEVEL": "warning"},
        start_new_session=True,
    )
    backend = Backend(version, port, process)
    lines: list[str] = []
    backend.reader = asyncio.create_task(log_output(process, f"version {version}", lines))
    try:
        await wait_until_ready(backend, client, lines)
    except BaseException:
        await backend.stop()
        raise
    return backend


async def wait_until_ready(backend: Backend, client: httpx.AsyncClient, lines: list[str]) -> None:
    """Returns when the backend answers.

    Args:
        lines: its output so far, for the message of the error.

    Raises:
        StageError: it ended, or did not answer in time.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + START_WITHIN
    while loop.time() < until:
        if backend.ended:
            assert backend.reader
            await asyncio.wait({backend.reader}, timeout=5)
            raise StageError(f"version {backend.version} does not start: {_cause(lines)}")
        with suppress(httpx.TransportError):
            answers = (await client.get(f"http://{HOST}:{backend.port}/ping")).is_success
            # The port was free when it was chosen; by now another process, with another model, may answer there.
            if answers and _listens(backend):
                return
        await asyncio.sleep(0.2)
    raise StageError(f"version {backend.version} did not answer within {START_WITHIN:.0f} s")


def _listens(backend: Backend) -> bool:
    """Whether the port is held by the backend's process or one that it started."""
    with suppress(psutil.Error):
        own = psutil.Process(backend.process.pid)
        connections = [each for process in (own, *own.children(True)) for each in process.net_connections("tcp")]
        return any(each.status == psutil.CONN_LISTEN and each.laddr.port == backend.port for each in connections)
    return False  # one of them has ended


def _cause(lines: list[str]) -> str:
    """The first error of a traceback: the last one is only that of the process around it."""
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (errors or lines[-1:] or ["it said nothing"])[0]


async def log_output(process: asyncio.subprocess.Process, name: str, lines: list[str]) -> None:
    """Logs the output of a process, under a name, until it ends; `lines` holds the last 200."""
    assert process.stdout is not None
    while line := await _line(process.stdout):
        for shown in split_lines([line]):
            lines[:] = [*lines[-199:], shown]
            logger.info("%s | %s", name, shown)


async def _line(stream: asyncio.StreamReader) -> bytes:
    """Empty at the end. A line of any length is read: a process blocks when nobody reads its output."""
    try:
        return await stream.readline()
    except ValueError:  # longer than the reader's buffer, which asyncio has emptied
        return b"(a line too long to be shown)\n"


def fetch(version: Version, store: Path) -> Path:
    """The model of a version in a folder of its own below `store`; downloaded unless it is there already.

    So a process that died can be started again while the registry is gone.

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
    """Compares the weights' sha256, if the version has one: a power cut truncates a copy, a disk damages it later."""
    return not version.sha256 or artifacts.weights_sha256(model) == version.sha256


def remove_others(store: Path, keep: Path) -> None:
    """Removes the models of other versions."""
    for each in store.iterdir():
        if each != keep and each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
