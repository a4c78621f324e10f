"""Passes requests on to the backend of the version in force, and starts and replaces that backend.

A request that finds no backend waits for the next one; none is lost.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pipelines.processes.servers import HOST
from pipelines.serving.backends import Backend, fetch, remove_others, start_backend
from pipelines.serving.version_in_force import VersionInForce
from stages.registry.versions import Version
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Backends that may die while answering a request before it is refused. Predictions change nothing, so repeating is
safe."""
MAX_FAILED_STARTS = 3
"""Failed starts in a row, after which requests are refused instead of waiting for the next start."""
PATIENCE = 300.0
"""Seconds that a request waits for a backend."""
DRAIN = 120.0
"""Seconds for the old backend to answer its open requests: twice MLflow's own limit for a request."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries to start a version that does not start, at most."""
# Headers about one connection, not about the message.
_HOP_BY_HOP = {"connection", "content-length", "date", "host", "keep-alive", "server", "te", "trailer"}
_HOP_BY_HOP |= {"transfer-encoding", "upgrade", "accept-encoding", "expect"}


class Proxy:
    """Forwards requests to the backend of the version in force, and keeps that backend running."""

    def __init__(self, name: str, interval: float, store: Path) -> None:
        self.store = store
        self.client = httpx.AsyncClient(
            # One connection per request: the other side may close a kept one at the very moment it is used.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            timeout=httpx.Timeout(None, connect=30),
            trust_env=False,
        )
        self.backend: Backend | None = None
        self.draining: set[Backend] = set()
        self.changed = asyncio.Condition()
        """Notified when there is another backend, or none to be waited for."""
        self.retrying = asyncio.Lock()
        self.wake = asyncio.Event()
        self.last_good: Version | None = None
        """The last version that answered."""
        self.failed: dict[int, tuple[int, float]] = {}
        """Versions that did not start: number of failures in a row, and when to try again."""
        self.tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        self.in_force = VersionInForce(name, interval, lambda: _call(loop, self.wake.set))

    def begin(self) -> None:
        """Serves the version in force from now on."""
        threading.Thread(target=self.in_force.follow, daemon=True).start()
        self._spawn(self._follow())

    async def close(self) -> None:
        """Ends all backends."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for backend in [self.backend, *self.draining]:
            if backend:
                await backend.stop()
        await self.client.aclose()

    # ------------------------------------------------------------------------------------------------- requests

    async def respond(self, request: Request) -> Response:
        """The response of the version in force; the header X-Model-Version names it. 503 while there is none."""
        body = await request.body()
        if response := await self._try(request, body):
            return response
        # The backend died of this request, or of another one that it was answering at the same time. The possible
        # culprits are repeated one after another, so that none fails because of another.
        async with self.retrying:
            for _ in range(ATTEMPTS - 1):
                if response := await self._try(request, body):
                    return response
        return JSONResponse({"error": f"the model's process broke off its answer, {ATTEMPTS} times in a row"}, 502)

    async def _try(self, request: Request, body: bytes) -> Response | None:
        """None where the backend broke off its answer."""
        until = time.monotonic() + PATIENCE
        while backend := await self._acquire():
            try:
                return await self._forward(backend, request, body)
            except httpx.TransportError as error:
                with suppress(TimeoutError):  # its end is seen in a moment
                    await asyncio.wait_for(backend.process.wait(), timeout=5)
                # A backend that could not be reached because it had ended did not end because of this request.
                died_before = isinstance(error, httpx.ConnectError) and backend.ended
                if not died_before or time.monotonic() > until:
                    return None
            finally:
                backend.in_flight -= 1
        return self._unavailable()

    async def _forward(self, backend: Backend, request: Request, body: bytes) -> Response:
        url = f"http://{HOST}:{backend.port}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        # As bytes, unchanged: httpx accepts only ASCII in text.
        headers = [(key, value) for key, value in request.headers.raw if key.decode("latin-1") not in _HOP_BY_HOP]
        got = await self.client.request(request.method, url, content=body, headers=headers)
        kept = {key: value for key, value in got.headers.items() if key not in _HOP_BY_HOP}
        return Response(got.content, got.status_code, kept | {"X-Model-Version": str(backend.version)})

    async def _acquire(self) -> Backend | None:
        """The backend, with this request counted in `in_flight`; waits for it while one may come."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE), self.changed:
                await self.changed.wait_for(lambda: self.backend or self._gave_up())
        if self.backend:
            self.backend.in_flight += 1
        return self.backend

    def _gave_up(self) -> bool:
        """No version is known, or it failed to start again and again."""
        if version := self.last_good or self.in_force.version:
            return self.failed.get(version.number, (0, 0.0))[0] >= MAX_FAILED_STARTS
        return self.in_force.was_read

    def _unavailable(self) -> Response:
        known = self.in_force.version
        why = f"version {known.number} does not start; see the log" if known else self.in_force.message
        return JSONResponse({"error": why}, 503, {"Retry-After": "10"})

    # ------------------------------------------------------------------------------------------------- backends

    async def _follow(self) -> None:
        """Serves the version in force, for ever."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), timeout=1)
            self.wake.clear()
            async with self.changed:
                self.changed.notify_all()  # those who wait may learn that there is nothing to wait for
            if version := self._version_to_start():
                try:
                    await self._switch(version)
                except Exception as error:  # a full disk, a locked database: whatever it is, it is tried again
                    self._count_failure(version.number, error)

    def _version_to_start(self) -> Version | None:
        wanted, now = self.in_force.version, time.monotonic()
        # Without a backend, the last good version comes first: another one may never start.
        candidates = [wanted] if self.backend else [self.last_good, wanted]
        for each in candidates:
            running = self.backend is not None and each is not None and self.backend.version == each.number
            if each and not running and now >= self.failed.get(each.number, (0, 0.0))[1]:
                return each
        return None

    async def _switch(self, wanted: Version) -> None:
        logger.info("serve: starting version %d of %s", wanted.number, wanted.name)
        model = await asyncio.to_thread(fetch, wanted, self.store)
        new = await start_backend(wanted.number, model, self.client)
        async with self.changed:
            old, self.backend = self.backend, new
            self.changed.notify_all()
        self.last_good = wanted
        self.failed.pop(wanted.number, None)
        self._spawn(self._watch(new))
        logger.info("serve: version %d of %s answers", wanted.number, wanted.name)
        remove_others(self.store, model)
        if old:
            self.draining.add(old)
            self._spawn(self._drain(old))

    def _count_failure(self, number: int, error: Exception) -> None:
        times = self.failed.get(number, (0, 0.0))[0] + 1
        pause = min(2.0**times, LONGEST_PAUSE)
        self.failed[number] = (times, time.monotonic() + pause)
        now = f"version {self.backend.version} is served on" if self.backend else "NOTHING IS SERVED"
        why = error if isinstance(error, StageError) else f"version {number}: {type(error).__name__}: {error}"
        logger.error("error: %s; %s; trying again in %.0f s", why, now, pause)

    async def _watch(self, backend: Backend) -> None:
        await backend.process.wait()
        if self.backend is backend:
            logger.warning("warning: the process of version %d ended; starting it again", backend.version)
            self.backend = None
            self.wake.set()
            await backend.stop()  # what is left of its group

    async def _drain(self, old: Backend) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN):
                while old.in_flight:
                    await asyncio.sleep(0.05)
        await old.stop()
        self.draining.discard(old)
        logger.info("serve: the process of version %d has answered all it was asked, and ended", old.version)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def _call(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(what)
