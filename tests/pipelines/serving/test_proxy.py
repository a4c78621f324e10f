"""The proxy without its backends: what it tries again, and what it forwards."""

import asyncio
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

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
        while tries < 2 and not following.done():
            await asyncio.sleep(0.05)
        following.cancel()
        await proxied.close()

    monkeypatch.setattr(proxy, "fetch", no_space)
    asyncio.run(follow())
    assert tries >= 2
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


def test_who_breaks_every_backend_is_refused_and_who_was_beside_it_is_answered(tmp_path: Path) -> None:
    """Repeated at the same time as the request that kills, every repetition would die with it."""
    open_requests: list[asyncio.Future[Response | None]] = []

    async def attempt(_: object, body: bytes) -> Response | None:
        answer: asyncio.Future[Response | None] = asyncio.get_running_loop().create_future()
        open_requests.append(answer)
        await asyncio.sleep(0)
        if body == b"kill":
            for each in open_requests:
                each.set_result(None)
            open_requests.clear()
        elif await asyncio.wait([answer], timeout=0.1) == (set(), {answer}):
            return Response()
        return await answer

    async def ask() -> list[int]:
        proxied = Proxy(NAME, 1, tmp_path)
        proxied._try = attempt  # type: ignore[method-assign,assignment]
        bodies = (b"kill", b"one", b"two")
        requests = [SimpleNamespace(body=partial(asyncio.sleep, 0, each)) for each in bodies]
        answers = await asyncio.gather(*(proxied.respond(each) for each in requests))  # type: ignore[arg-type]
        await proxied.close()
        return [each.status_code for each in answers]

    assert asyncio.run(ask()) == [502, 200, 200]


def test_a_backend_that_cannot_be_reached_any_more_did_not_break_off_an_answer(tmp_path: Path) -> None:
    """On a busy machine, the process of a model that has died may end seconds later."""
    refused = iter(range(5))

    def answer(request: httpx.Request) -> httpx.Response:
        if next(refused, None) is not None:
            raise httpx.ConnectError("refused")
        return httpx.Response(200)

    async def ask() -> int:
        proxied = Proxy(NAME, 1, tmp_path)
        proxied.client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        process = SimpleNamespace(wait=partial(asyncio.sleep, 0), returncode=1)
        proxied.backend = Backend(3, 1, process)  # type: ignore[arg-type]
        scope = {"type": "http", "method": "GET", "path": "/ping", "query_string": b"", "headers": []}
        receive: Any = partial(asyncio.sleep, 0, {"type": "http.request"})
        response = await proxied.respond(Request(scope, receive))
        proxied.backend = None
        await proxied.close()
        return response.status_code

    assert asyncio.run(ask()) == 200
