"""The flows as Prefect deployments, and the runner that starts them when they are due."""

import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pipelines import environment, reconcile, verify
from pipelines.processes.supervisor import FLOWS, clear_up
from pipelines.retrain import flow as retrain
from stages.params.reconcile import Reconcile
from stages.params.retrain import Retrain
from stages.runtime.params_file import load_section

environment.apply()  # Prefect reads its settings when it is imported

from prefect.client.orchestration import SyncPrefectClient, get_client  # noqa: E402
from prefect.client.schemas import filters, objects  # noqa: E402
from prefect.client.schemas.objects import StateType  # noqa: E402
from prefect.flows import EntrypointType  # noqa: E402
from prefect.runner import Runner  # noqa: E402
from prefect.schedules import Cron, Interval, Schedule  # noqa: E402
from prefect.states import Crashed  # noqa: E402

NAME = "schedule"
"""Name of the deployments that are made here: `retrain/schedule` in Prefect. Those of prefect.yaml have another."""
MODULES = {"retrain": retrain, "reconcile": reconcile, "verify": verify}
"""The module of each flow; the flow has the same name as its key."""


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
    module = MODULES[name]
    alone = objects.ConcurrencyLimitConfig(limit=1, collision_strategy=objects.ConcurrencyLimitStrategy.CANCEL_NEW)
    return getattr(module, name).to_deployment(
        NAME,
        schedule=schedule(name),
        concurrency_limit=alone,
        entrypoint_type=EntrypointType.MODULE_PATH,
        description=module.__doc__,
    )


def schedule(name: str) -> Schedule | None:
    """When a flow runs, as params.yaml has it; None for those that only a person starts.

    Raises:
        ParamsError: `retrain.cron` is no cron expression, or never fires.
    """
    if name == "reconcile":
        return Interval(load_section("reconcile", Reconcile).interval)
    if name != "retrain":
        return None
    return Cron(load_section("retrain", Retrain).cron, timezone="UTC")


def put_in_order(flows: Sequence[str]) -> None:
    """Marks as crashed what killed processes left unended, and of the scheduled runs that were missed keeps one a flow.

    Only runs of our deployments: nobody else runs them, and everything that this checkout's schedule started has ended.
    """
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


def _runs(client: SyncPrefectClient, flow: str, *states: StateType) -> list[Any]:
    return list(
        client.read_flow_runs(
            flow_filter=filters.FlowFilter(name=filters.FlowFilterName(any_=[flow])),
            deployment_filter=filters.DeploymentFilter(name=filters.DeploymentFilterName(any_=[NAME])),
            flow_run_filter=filters.FlowRunFilter(
                state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=list(states)))
            ),
        )
    )
