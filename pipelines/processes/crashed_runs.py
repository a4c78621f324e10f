"""Marks the flow run of a killed process as crashed: Prefect itself may never notice that it ended."""

import logging
import os

import httpx

from pipelines import environment

environment.apply()  # Prefect reads its settings when it is imported

from prefect.client.orchestration import get_client  # noqa: E402
from prefect.context import FlowRunContext  # noqa: E402
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError  # noqa: E402
from prefect.states import Crashed  # noqa: E402

logger = logging.getLogger(__name__)


def mark_crashed(flow_run: str) -> bool:
    """Marks it, unless it has ended by itself; False: Prefect was not reached, so it has to be tried again."""
    # No server is named, and this is no flow run: starting an API only for this would take half a minute.
    if not os.environ.get("PREFECT_API_URL") and FlowRunContext.get() is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run).state  # type: ignore[arg-type]  # it takes a string as well
            if state is not None and not state.is_final():
                # Not forced: Prefect's rules then release the deployment's concurrency slot.
                client.set_flow_run_state(flow_run, Crashed(message="killed; the next run cleared up after it"))
                logger.warning("warning: the flow run %s was killed; marked as crashed", flow_run)
    except ObjectNotFound:  # another server's, or deleted
        return True
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        logger.warning("warning: the flow run %s was killed; Prefect could not be told (%s)", flow_run, error)
        return False
    return True
