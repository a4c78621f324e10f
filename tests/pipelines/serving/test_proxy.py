"""The proxy without its backends: what it tries again, and what it forwards."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from pipelines.serving import proxy
from pipelines.serving.backends import Backend
from pipelines.serving.proxy import Proxy
from stages.registry.versions import Version

NAME = "tiny"


def test_whatever_keeps_a_version_from_starting_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def no_space(*_: object) -> Path:
        nonlocal tries
        tries += 1
        raise OSError(28, "No space left on device")

    async def follow() -> None:
        proxied = Proxy(NAME, 1, tmp_path)
        proxied.in_force.version = Version(NAME, 1, "", "", {}, (), "", 0)
        following = asyncio.create_task(proxied._follow())
        until = time.monotonic() + 20
        while tries < 2 and not following.done() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        following.cancel()
        await proxied.close()

    monkeypatch.setattr(proxy, "fetch", no_space)
    asyncio.run(follow())
    assert tries == 2
    assert "version 1: OSError: [Errno 28] No space left on device; NOTHING IS SERVED" in caplog.text


def test_headers_are_passed_on_as_they_came(tmp_path: Path) -> None:
    got: list[tuple[bytes, bytes]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        got.extend(request.headers.raw)
        return httpx.Response(200, text="ding")

    async def ask() -> None:
        proxied = Proxy(NAME, 1, tmp_path)
        proxied.client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        headers = [(b"x-user", "Zo\xeb".encode("latin-1")), (b"host", b"there")]
        scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b"", "headers": headers}
        response = await proxied._forward(Backend(3, 1, None), Request(scope), b"{}")  # type: ignore[arg-type]
        assert (response.status_code, response.headers["X-Model-Version"]) == (200, "3")
        await proxied.close()

    asyncio.run(ask())
    assert (b"x-user", b"Zo\xeb") in got
    assert b"there" not in dict(got).values()
