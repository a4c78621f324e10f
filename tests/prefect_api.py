"""A real Prefect server of a test's own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.environment import ROOT, settings
from pipelines.processes.servers import HOST, free_port, prefect_server, start, stop, wait_until_ready


@contextmanager
def prefect_api(folder: Path, first_port: int) -> Iterator[dict[str, str]]:
    """Runs a server whose files are in `folder`; yields the environment in which programs use it."""
    home = {**settings(), "PREFECT_HOME": str(folder / "prefect")}
    Path(home["PREFECT_HOME"]).mkdir(parents=True)
    port = free_port(first_port)
    service = prefect_server(HOST, port)
    log = folder / "prefect.log"
    with log.open("wb") as output:
        process = start(type(service)(service.name, service.command, {**home, **service.environment}), output)
    try:
        wait_until_ready(service, process, str(log))
        yield {**os.environ, **home, "PREFECT_API_URL": f"http://{HOST}:{port}/api", "PYTHONPATH": str(ROOT)}
    finally:
        stop(process)


def python(code: str, environment: dict[str, str], *arguments: str) -> str:
    """What a program prints, run in that environment; it must succeed."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
