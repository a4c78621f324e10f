"""Everything that works by itself, in one terminal: `python -m pipelines.schedule` (`make schedule`).

Prefect's server, MLflow's server, and the process that starts the flows when they are due. A child that ends is started
again, on the same port; Ctrl-C stops them all. A server that PREFECT_API_URL or MLFLOW_TRACKING_URI names is used
instead of one of our own.
"""

import argparse
import asyncio
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from subprocess import PIPE, Popen
from typing import IO, Any

from pipelines import environment
from pipelines.processes.flow_lock import at_work, clear_after_kill, exclusive
from pipelines.processes.servers import (
    HOST,
    MLFLOW_PORT,
    PREFECT_PORT,
    START_WITHIN,
    Service,
    answers,
    free_port,
    mlflow_server,
    prefect_server,
    reached_at,
    start,
    stop,
)
from pipelines.processes.stage_process import Stop, signals_to, split_lines
from stages.params.all import check_all
from stages.params.reconcile import Reconcile
from stages.params.retrain import Retrain
from stages.registry.client import is_server
from stages.runtime.command import StageError, run
from stages.runtime.params_file import load_section

NAME = "schedule"
"""Of the deployments that are made here: `retrain/schedule` in Prefect. Those of prefect.yaml have another."""
FLOWS = ("retrain", "reconcile", "verify")
"""Each is the function of that name in the module of that name."""
FLOWS_GRACE = 60.0
"""Seconds for the flows to stop: longer than they take to stop their stages."""
QUICK = 60.0
"""A child that ends within these seconds of its start has ended quickly."""
ASK_EVERY = 10.0
"""Seconds between two looks whether a server still answers."""
HANGS = 300.0
"""Seconds without an answer, after which a server that does not end is started again. A busy one may miss some."""
TRIES = 5
"""Quick ends in a row, after which a child is not started again."""


# ------------------------------------------------------------------------------------------------------- supervision


@dataclass
class Child:
    """A service and the process that runs it now."""

    service: Service
    process: "Popen[bytes] | None" = None
    started: float = 0.0
    quick_ends: int = 0
    start_after: float = 0.0
    ready: bool = False
    answered: float = 0.0
    """When it was last known to be there."""
    ask_after: float = 0.0
    last_lines: list[str] = field(default_factory=list)

    def start(self, say: Callable[[str], None]) -> None:
        """Starts it; its lines go to `say`, each with its name before it."""
        self.process = start(self.service, PIPE)
        self.started = self.answered = self.ask_after = time.monotonic()
        self.ready = not self.service.health
        self.last_lines.clear()
        assert self.process.stdout is not None
        threading.Thread(target=self._pass_on, args=(self.process.stdout, say), daemon=True).start()

    def look(self, say: Callable[[str], None]) -> None:
        """Starts it where it is due, and sees whether it is ready, has ended or hangs.

        Raises:
            StageError: it keeps ending soon after its start.
        """
        if self.process is None:
            if time.monotonic() >= self.start_after:
                self.start(say)
        elif self.process.poll() is not None:
            self._ended(self.process, say)
        elif self.service.health and time.monotonic() >= self.ask_after:
            if answers(self.service.health):
                self.ready, self.answered = True, time.monotonic()
            elif time.monotonic() - self.answered > (HANGS if self.ready else START_WITHIN):
                self._ended(self.process, say)
            if self.ready:
                self.ask_after = time.monotonic() + ASK_EVERY

    def stop(self, at_once: bool = False) -> None:
        """Ends it, with all that it started."""
        if self.process is not None:
            stop(self.process, 0.0 if at_once else self.service.grace)
            self.process = None

    def _ended(self, process: "Popen[bytes]", say: Callable[[str], None]) -> None:
        how = "did not answer in time" if process.poll() is None else f"ended with exit code {process.returncode}"
        quick = not self.ready or time.monotonic() - self.started < QUICK
        self.quick_ends = self.quick_ends + 1 if quick else 1
        self.stop()  # what it left of its group
        name = self.service.name
        if self.quick_ends >= TRIES:
            last = "\n".join(self.last_lines)
            raise StageError(f"{name} {how}, {TRIES} times in a row, soon after its start; its last words:\n{last}")
        pause = 2.0 ** (self.quick_ends - 1)
        self.start_after = time.monotonic() + pause
        say(f"schedule | {name} {how}; starting it again in {pause:.0f} s")

    def _pass_on(self, stream: IO[bytes], say: Callable[[str], None]) -> None:
        descriptor = stream.fileno()
        with stream:
            for line in split_lines(iter(lambda: os.read(descriptor, 65536), b"")):
                self.last_lines[:] = [*self.last_lines[-9:], line]
                say(f"{self.service.name:8} | {line}")


def keep_running(servers: Sequence[Service], flows: Service, stop: Stop, say: Callable[[str], None]) -> None:
    """Runs the servers, and the flows as soon as all servers have answered, until asked to stop.

    Raises:
        StageError: one of them keeps ending soon after its start. The others are stopped.
    """
    children = [Child(service) for service in servers]
    last = Child(flows)
    try:
        while not stop.asked():
            for child in children:
                child.look(say)
            # Not started again while a server is down: it could only fail.
            all_there = all(child.ready and child.process for child in children)
            if last.process is not None or all_there:
                last.look(say)
            # After a while without a server, Prefect's runner starts flows again, but hears of no Cancel button.
            if all_there and last.process and last.started < max((child.started for child in children), default=0):
                _renew(last, say)
            time.sleep(0.2)
        say("schedule | stopping: first the flows, then the servers (again: at once)")
        last.stop()
        clear_up()  # while Prefect can still be told
        for child in children:
            child.stop()
    finally:  # an error, or the second signal
        for child in [last, *children]:
            child.stop(at_once=True)


def _renew(flows: Child, say: Callable[[str], None]) -> None:
    """Ends the flows' process, to be started again, as soon as no flow is at work."""
    if not any(map(at_work, FLOWS)):
        say("schedule | a server was started again: so are the flows")
        flows.stop()


def clear_up() -> None:
    """Ends what killed flows left behind, and tells Prefect."""
    for name in FLOWS:
        clear_after_kill(name)


# ------------------------------------------------------------------------------------------------------------- flows


def serve_flows(flows: Sequence[str] = FLOWS) -> None:
    """Starts the flows when they are due, each in a process of its own, until SIGTERM; it waits for those at work.

    Raises:
        StageError: params.yaml is wrong.
    """
    clear_up()
    deployments = [deployment(name) for name in flows]
    put_in_order(flows)
    asyncio.run(_serve(deployments))


async def _serve(deployments: Sequence[Any]) -> None:
    from prefect.runner import Runner

    runner = Runner(NAME)
    stopping: list[asyncio.Task[None]] = []

    def on_sigterm(*_: object) -> None:
        # Not Prefect's own handler: in 3.8.8 it forgets to await what stops the runs, and they would be cut off.
        if not runner.started:
            sys.exit(0)
        asyncio.get_running_loop().call_soon(lambda: stopping.append(asyncio.create_task(runner.astop())))

    runner.handle_sigterm = on_sigterm  # type: ignore[method-assign]
    for each in deployments:
        await runner.aadd_deployment(each)
    print("flows are started when they are due", flush=True)
    await runner.start()
    await asyncio.gather(*stopping)


def deployment(name: str) -> Any:
    """The flow of that name with its schedule; one run at a time, and a run that finds another at work is cancelled."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.flows import EntrypointType

    module = importlib.import_module(f"pipelines.{name}")
    alone = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    return getattr(module, name).to_deployment(
        NAME,
        schedule=schedule(name),
        concurrency_limit=alone,
        entrypoint_type=EntrypointType.MODULE_PATH,
        description=module.__doc__,
    )


def schedule(name: str) -> Any:
    """When a flow runs, as params.yaml has it; None for those that only a person starts.

    Raises:
        StageError: `retrain.cron` is no cron expression.
    """
    from prefect.schedules import Cron, Interval

    if name == "reconcile":
        return Interval(load_section("reconcile", Reconcile).interval)
    if name != "retrain":
        return None
    return Cron(checked_cron(load_section("retrain", Retrain).cron), timezone="UTC")


def checked_cron(expression: str) -> str:
    """The expression itself.

    Raises:
        StageError: Prefect does not take it.
    """
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=expression, timezone="UTC")
    except ValueError:
        raise StageError(
            f"params.yaml: `retrain.cron`: expected minute, hour, day, month and weekday, as in '0 3 * * *', "
            f"got {expression!r}"
        ) from None
    return expression


def put_in_order(flows: Sequence[str]) -> None:
    """Marks as crashed what killed processes left unended, and of the scheduled runs that were missed keeps one a flow.

    Only runs of our deployments: nobody else runs them, and everything that this checkout's schedule started has ended.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    with get_client(sync_client=True) as client:
        for name in flows:
            # They may not have got as far as the lock, whose next holder marks them.
            for each in _runs(client, name, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING):
                client.set_flow_run_state(each.id, Crashed(message="its process was killed"))
                print(f"warning: the flow run {each.name} ({name}) was killed; marked as crashed", flush=True)
            now = datetime.now(UTC)
            late = [each for each in _runs(client, name, StateType.SCHEDULED) if each.expected_start_time < now]
            missed = sorted((each for each in late if each.auto_scheduled), key=lambda run: run.expected_start_time)
            # What a person asked for stays, with its parameters, and is not to find another one at work.
            for each in missed if len(missed) < len(late) else missed[:-1]:
                client.delete_flow_run(each.id)


def _runs(client: Any, flow: str, *states: Any) -> list[Any]:
    from prefect.client.schemas import filters

    return list(
        client.read_flow_runs(
            flow_filter=filters.FlowFilter(name=filters.FlowFilterName(any_=[flow])),
            deployment_filter=filters.DeploymentFilter(name=filters.DeploymentFilterName(any_=[NAME])),
            flow_run_filter=filters.FlowRunFilter(
                state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=list(states)))
            ),
        )
    )


# -------------------------------------------------------------------------------------------------------------- main


def _run_all(host: str) -> None:
    prefect_api, mlflow = os.environ.get("PREFECT_API_URL", ""), os.environ.get("MLFLOW_TRACKING_URI", "")
    servers = []
    if not prefect_api:
        port = free_port(PREFECT_PORT, host)
        servers.append(prefect_server(host, port))
        prefect_api = f"http://{reached_at(host)}:{port}/api"
    if not is_server(mlflow):
        port = free_port(MLFLOW_PORT, host)
        servers.append(mlflow_server(host, port))
        mlflow = f"http://{reached_at(host)}:{port}"
    addresses = {"PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": mlflow}
    os.environ.update(addresses)
    checked_cron(load_section("retrain", Retrain).cron)  # imports Prefect, which reads its settings once: not before
    _say(f"schedule | Prefect at {prefect_api.removesuffix('/api')}, MLflow at {mlflow}; Ctrl-C stops everything")
    flows = Service("flows", [sys.executable, "-m", "pipelines.schedule", "--flows"], grace=FLOWS_GRACE)
    asked = Stop()
    with signals_to(asked), suppress(KeyboardInterrupt):
        keep_running(servers, flows, asked, _say)


def _say(line: str) -> None:
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
        serve_flows()
        return
    with exclusive(NAME):
        _run_all(arguments.host)


if __name__ == "__main__":
    run(main)
