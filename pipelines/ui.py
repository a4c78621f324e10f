"""The MLflow UI, with links to its most useful pages: `python -m pipelines.ui` (`make ui`)."""

import argparse
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipelines.processes.servers import HOST, MLFLOW_PORT, free_port, mlflow_server, start, stop, wait_until_ready
from stages.params.register import Register
from stages.registry import lineage, versions
from stages.registry.client import is_server, reachable, tracking_uri
from stages.registry.links import comparison_link, run_link, version_link
from stages.runtime import layout
from stages.runtime.command import StageError, run
from stages.runtime.params_file import load_section


def links(server: str, name: str) -> list[tuple[str, str]]:
    """Label and link of the newest version, its run, all versions, and the comparison of the newest runs.

    Raises:
        StageError: the registry's server or database failed.
    """
    found = [("all versions", f"{server}/#/models/{name}")]
    with reachable():
        registered, runs = versions.list_versions(name), lineage.newest_runs("finetune")
    if registered:
        newest = registered[0]
        found.append((f"version {newest.number}", version_link(name, newest.number, server)))
        its_run = [each for each in runs if each.info.run_id == newest.run_id]
        found += [("its run", run_link(each, server)) for each in its_run]
    if len(runs) > 1:
        found.append(("comparison of runs", comparison_link(runs, server)))
    elif runs and not registered:
        found.append(("newest run", run_link(runs[0], server)))
    return found


@contextmanager
def server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server over the local database; it answers when yielded, and ends with the block.

    Raises:
        StageError: it ended, or was not healthy in time.
    """
    service = mlflow_server(HOST, port)
    layout.MLFLOW_LOG.parent.mkdir(parents=True, exist_ok=True)
    with layout.MLFLOW_LOG.open("wb") as log:
        process = start(service, log)
    try:
        wait_until_ready(service, process, str(layout.MLFLOW_LOG))
        yield process
    finally:
        stop(process)


def main() -> None:
    """Starts the server unless MLFLOW_TRACKING_URI names one, prints the links, and waits for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=MLFLOW_PORT, help="the first port to try (default: %(default)s)")
    port = parser.parse_args().port
    name = load_section("register", Register).name
    uri = tracking_uri()
    if is_server(uri):
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
        raise StageError(f"the MLflow server ended with exit code {process.returncode}; see {layout.MLFLOW_LOG}")


def _print_links(address: str, name: str) -> None:
    found = links(address, name)
    width = max(len(label) for label, _ in found)
    print(*(f"{label:<{width}}  {link}" for label, link in found), sep="\n", flush=True)


if __name__ == "__main__":
    run(main)
