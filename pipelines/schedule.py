"""Everything that runs by itself, in one terminal: `python -m pipelines.schedule` (`make schedule`).

Prefect's server, MLflow's server, and the process that starts the flows when they are due. A child that ends is started
again, on the same port; Ctrl-C stops them all. A server that PREFECT_API_URL or MLFLOW_TRACKING_URI names is used
instead of one of our own.
"""

import argparse
import logging
import os
import sys
from contextlib import suppress

from pipelines import environment
from pipelines.processes import servers
from pipelines.processes.flow_lock import exclusive
from pipelines.processes.servers import HOST, Service
from pipelines.processes.stage_process import Stop, signals_to
from pipelines.processes.supervisor import keep_running
from stages.params.all import check_all
from stages.params.retrain import Retrain
from stages.registry.client import is_server
from stages.runtime.command import run
from stages.runtime.params_file import load_section

FLOWS_GRACE = 60.0
"""Seconds for the flows to stop: longer than they take to stop their stages."""


def _run_all(host: str) -> None:
    prefect_api, mlflow = os.environ.get("PREFECT_API_URL", ""), os.environ.get("MLFLOW_TRACKING_URI", "")
    own: list[Service] = []
    if not prefect_api:
        port = servers.free_port(servers.PREFECT_PORT, host)
        own.append(servers.prefect_server(host, port))
        prefect_api = f"http://{servers.reached_at(host)}:{port}/api"
    if not is_server(mlflow):
        port = servers.free_port(servers.MLFLOW_PORT, host)
        own.append(servers.mlflow_server(host, port))
        mlflow = f"http://{servers.reached_at(host)}:{port}"
    addresses = {"PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": mlflow}
    os.environ.update(addresses)
    cron = load_section("retrain", Retrain).cron
    _log(f"schedule | Prefect at {prefect_api.removesuffix('/api')}, MLflow at {mlflow}; Ctrl-C stops everything")
    _log(f"schedule | looks for deliveries at `{cron}` (minute, hour, day, month, weekday; UTC)")
    flows = Service("flows", [sys.executable, "-m", "pipelines.schedule", "--flows"], grace=FLOWS_GRACE)
    stop = Stop()
    with signals_to(stop), suppress(KeyboardInterrupt):
        keep_running(own, flows, stop, _log)


def _log(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Checks params.yaml, then runs until Ctrl-C. Exit code 1 where a child cannot be kept running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default=HOST, help="where our own servers listen (default: %(default)s)")
    parser.add_argument("--flows", action="store_true", help="only the process that starts the flows")
    arguments = parser.parse_args()
    check_all()
    environment.apply()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every request
    if arguments.flows:
        from pipelines.processes.deployments import serve_flows

        serve_flows()
        return
    with exclusive("schedule"):
        _run_all(arguments.host)


if __name__ == "__main__":
    run(main)
