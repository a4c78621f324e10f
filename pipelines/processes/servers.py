"""Servers as child processes: their ports, commands and health checks; stopping one ends all that it started."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from stages.registry.client import artifact_root, tracking_uri
from stages.runtime.command import StageError
from stages.runtime.processes import end_group

HOST = "127.0.0.1"
MLFLOW_PORT = 5000
PREFECT_PORT = 4200
START_WITHIN = 180.0
"""Seconds. MLflow's server takes about 25 on an idle machine, most of it imports."""
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Service:
    """A program that is to run until it is stopped."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to that of this process."""
    health: str = ""
    """A URL that answers once it is ready; empty: it is ready when it runs."""
    grace: float = GRACE


def mlflow_server(host: str, port: int) -> Service:
    """MLflow's server and UI over the local database."""
    uri = tracking_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    # Artifacts lie beside the database, where the stages write them; clients read them there, not through the server.
    command += ["--backend-store-uri", uri, "--default-artifact-root", str(artifact_root(uri))]
    command += ["--uvicorn-opts", "--log-level warning"]  # not a line for every request
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    quiet |= {"PYTHONWARNINGS": "ignore"}
    return Service("mlflow", command, quiet, f"http://{reached_at(host)}:{port}/health")


def prefect_server(host: str, port: int) -> Service:
    """Prefect's API, UI and scheduler over its database in PREFECT_HOME."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    # Slots of deployments are leased, by default in the server's memory: after a restart it would know of none, and
    # whoever works under one, training for an hour, would be ended when the lease is to be renewed.
    environment = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
    return Service("prefect", command, environment, f"http://{reached_at(host)}:{port}/api/health")


def reached_at(host: str) -> str:
    """The address at which programs on this machine reach a server that listens on `host`."""
    return HOST if host in ("0.0.0.0", "::", "") else host


def free_port(first: int, host: str = HOST) -> int:
    """`first`, or the next port after it that nobody listens on.

    Raises:
        StageError: a hundred ports in a row are taken, or there is no such address here.
    """
    for port in range(first, min(first + 100, 65_536)):
        with suppress(OSError), listening_socket(host, port):
            return port
    raise StageError(f"no free port on {host} from {first} on; give one with --port, or look at --host")


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, to be closed by the caller.

    Raises:
        OSError: the port is taken, or there is no such address here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def start(service: Service, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Starts it in a session of its own: Ctrl-C reaches only this process, which then stops it and all its workers."""
    return subprocess.Popen(
        service.command,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **service.environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def answers(url: str) -> bool:
    """Whether a server answers at a URL; one that asks for a password counts too."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False


def wait_until_ready(
    service: Service, process: subprocess.Popen[bytes], log: str, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Returns when the service answers, or when `stopped` returns True.

    Raises:
        StageError: it ended, or did not answer in time; the message names `log`, its output.
    """
    until = time.monotonic() + START_WITHIN
    while time.monotonic() < until and not stopped():
        if process.poll() is not None:
            raise StageError(f"the {service.name} server ended with exit code {process.returncode}; see {log}")
        if answers(service.health):
            return
        time.sleep(0.3)
    if not stopped():
        raise StageError(f"the {service.name} server did not answer within {START_WITHIN:.0f} s; see {log}")


def stop(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """Ends a process that `start` started, and then whatever is left of its group.

    SIGTERM goes to the process alone first, for `grace` seconds: it may have its own way of ending its children.
    """
    end_group(process.pid, process.poll, min(grace, GRACE), leader_grace=grace)
