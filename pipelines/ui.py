"""The MLflow UI with links to where one wants to go: `python -m pipelines.ui` (`make ui`)."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages import tracking
from stages.command import StageError, run
from stages.params.load import load_section
from stages.params.register import Register

HOST = "127.0.0.1"
LOG = Path(".synset/mlflow-server.log")
FIRST_PORT = 5000
START_WITHIN = 180.0
"""Seconds. The server takes about 25 on an idle machine, most of it imports."""


def links(server: str, name: str) -> list[tuple[str, str]]:
    """What to open, and where: the newest version, its run, all versions, the comparison of the newest runs.

    Raises:
        StageError: the registry's server or database failed.
    """
    found = [("all versions", f"{server}/#/models/{name}")]
    with tracking.reachable():
        versions, runs = tracking.versions(name), tracking.newest_runs("finetune")
    if versions:
        newest = versions[0]
        found.append((f"version {newest.number}", tracking.version_link(name, newest.number, server)))
        its_run = [each for each in runs if each.info.run_id == newest.run_id]
        found += [("its run", tracking.run_link(each, server)) for each in its_run]
    if len(runs) > 1:
        found.append(("comparison of runs", tracking.comparison_link(runs, server)))
    elif runs and not versions:
        found.append(("newest run", tracking.run_link(runs[0], server)))
    return found


def free_port(first: int) -> int:
    """`first`, or the next port after it that nobody listens on.

    Raises:
        StageError: a hundred ports in a row are taken.
    """
    for port in range(first, min(first + 100, 65_536)):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise StageError(f"no free port from {first} on; give one with --port")


@contextmanager
def server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server over the local database, healthy when yielded; its whole process group ends with the block.

    Raises:
        StageError: it ended, or was not healthy in time.
    """
    uri = tracking.tracking_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    # Runs and models lie where the stages wrote them, beside the database: the server reads them there, it is no proxy.
    command += ["--backend-store-uri", uri, "--default-artifact-root", str(tracking.artifact_root(uri))]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("wb") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then stops the server and all its workers.
        process = subprocess.Popen(command, env=os.environ | quiet, start_new_session=True, stdout=log, stderr=log)
    try:
        _wait(process, port)
        yield process
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_WITHIN
    while time.monotonic() < until:
        if process.poll() is not None:
            raise StageError(f"the MLflow server ended with exit code {process.returncode}; see {LOG}")
        with suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
            return
        time.sleep(0.3)
    raise StageError(f"the MLflow server was not healthy within {START_WITHIN:.0f} s; see {LOG}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: the server's workers are processes of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


def main() -> None:
    """Starts the server unless MLFLOW_TRACKING_URI names one, prints the links, and waits for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=FIRST_PORT, help="the first port to try (default: %(default)s)")
    port = parser.parse_args().port
    name = load_section("register", Register).name
    uri = tracking.tracking_uri()
    if tracking.is_server(uri):
        _print_links(uri.rstrip("/"), name)
        return
    # Set, because a shell starts background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    port = free_port(port)
    print(f"starting MLflow on port {port} ...", flush=True)
    with suppress(KeyboardInterrupt), server(port) as process:
        _print_links(f"http://{HOST}:{port}", name)
        print("Ctrl-C stops it", flush=True)
        process.wait()
        raise StageError(f"the MLflow server ended with exit code {process.returncode}; see {LOG}")


def _print_links(address: str, name: str) -> None:
    found = links(address, name)
    width = max(len(label) for label, _ in found)
    print(*(f"{label:<{width}}  {link}" for label, link in found), sep="\n", flush=True)


if __name__ == "__main__":
    run(main)
