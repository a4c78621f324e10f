"""A backend and its model: what is read, downloaded and waited for."""

import asyncio
import sys
from pathlib import Path

import httpx
import pytest

from pipelines.processes.servers import free_port
from pipelines.serving import backends
from pipelines.serving.backends import Backend
from stages.registry import versions
from stages.runtime.command import StageError
from stages.runtime.files import sha256
from tests.pipelines.tiny_registry import NAME, registered


def test_a_line_of_any_length_does_not_end_the_reading(caplog: pytest.LogCaptureFixture) -> None:
    async def read() -> list[str]:
        script = "print('x' * 300_000); print('after it')"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
        lines: list[str] = []
        await backends.log_output(process, "a version", lines)
        await process.wait()
        return lines

    assert asyncio.run(read())[-1] == "after it"


def test_a_damaged_copy_of_a_model_is_downloaded_again(registry: Path) -> None:
    Path("model").mkdir()
    weights = Path("model/model.safetensors")
    weights.write_bytes(b"weights" * 100)
    version = registered("one")
    versions.finish_version(version, sha256(weights))
    version = versions.list_versions(NAME)[0]
    model = backends.fetch(version, registry / "store")
    (copy,) = model.rglob("model.safetensors")
    with copy.open("r+b") as content:
        content.truncate(10)
    assert backends.fetch(version, registry / "store") == model
    assert sha256(copy) == version.sha256
    assert (model / "MLmodel").exists()
    assert [path.name for path in (registry / "store").iterdir()] == [model.name]

    (held,) = (registry / "mlartifacts").rglob("model.safetensors")
    held.write_bytes(b"others")
    assert backends.fetch(version, registry / "store") == model  # the copy is sound
    copy.unlink()
    with pytest.raises(StageError, match="the registry holds other weights than those registered"):
        backends.fetch(version, registry / "store")


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
                await backends.wait_until_ready(other, client, [])
            backend = Backend(2, port, await start())
            lines: list[str] = []
            backend.reader = asyncio.create_task(backends.log_output(backend.process, "version 2", lines))
            try:
                await backends.wait_until_ready(backend, client, lines)
            finally:
                for each in filter(None, (backend, other)):
                    await each.stop()

    if foreign:
        with pytest.raises(StageError, match=r"version 2 does not start: OSError.*Address already in use"):
            asyncio.run(wait())
    else:
        asyncio.run(wait())
