"""The version in force, over HTTP: `python -m pipelines.serve` (`make serve`).

Each version is served by a backend of its own, a process (`mlflow models serve`); the proxy forwards requests to it.
When another version comes into force, its backend is started beside the old one and takes over as soon as it answers;
the old one ends when its open requests are answered.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from pipelines import environment
from pipelines.processes.flow_lock import exclusive, folder
from pipelines.processes.servers import listening_socket
from pipelines.serving.proxy import Proxy
from stages.params.all import check_all
from stages.params.register import Register
from stages.params.serve import Serve
from stages.runtime.command import StageError, run
from stages.runtime.params_file import load_section

logger = logging.getLogger(__name__)


async def serve(name: str, params: Serve, listening: socket.socket, store: Path) -> None:
    """Serves the version in force of the model `name` until SIGINT or SIGTERM; open requests are answered first."""
    proxy = Proxy(name, params.interval, store)
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    app = Starlette(routes=[Route("/{path:path}", proxy.respond, methods=methods)])
    server = _Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=30))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)
    proxy.begin()
    try:
        await server.serve(sockets=[listening])
    finally:
        await proxy.close()


class _Server(uvicorn.Server):
    """Without uvicorn's own signal handlers: they would raise the signal again before the backends have ended."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def main() -> None:
    """Serves until Ctrl-C, at `serve.host` and `serve.port`."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    check_all()
    environment.apply()
    name, params = load_section("register", Register).name, load_section("serve", Serve)
    # A registry that is gone is noticed soon, and asked again.
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
