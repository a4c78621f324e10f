"""`python -m pipelines.verify [VERSION]`: a registered version, derived again from its commit.

Then its weights and figures are compared with what the registry holds, and the version is tagged `reproduced`,
`differs` or `not comparable`.
"""

import argparse
import sys
from functools import partial
from typing import Any

from pipelines import environment
from pipelines.maintenance.derivation import DIFFERS, NAME, REPRODUCED, choose, derive, record
from pipelines.notify import tell
from pipelines.processes.flow_lock import BusyError, exclusive
from pipelines.processes.flow_run import flow_stop, run_flow, run_logged
from pipelines.processes.stage_process import signals_to
from stages.params.register import Register
from stages.registry.client import reachable
from stages.runtime.command import StageError, run
from stages.runtime.params_file import load_section

environment.apply()  # Prefect reads its settings when it is imported

from prefect import flow, runtime  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.states import Cancelled, Completed, Failed, State  # noqa: E402


@flow(name=NAME, persist_result=False)
def verify(version: int | None = None) -> State[Any]:
    """Derives a version again; without a number, the one in force, else the newest."""
    stop = flow_stop()
    try:
        with exclusive(NAME, str(runtime.flow_run.id)), signals_to(stop), reachable():
            chosen = choose(load_section("register", Register).name, version)
            finding = derive(chosen, partial(run_logged, stop=stop))
            record(chosen, finding)
    except BusyError as error:
        return Completed(name="Skipped", message=str(error))
    except StageError as error:
        if stop.requested():
            return Cancelled(message=str(error))
        tell("verify failed", str(error))
        return Failed(message=str(error))
    message = f"{chosen.name} version {chosen.number}: {finding.result}: {finding.detail}"
    create_markdown_artifact(key=NAME, markdown=f"{message}\n")
    # A version that differs is what an alarm is for; of one that cannot be compared, nothing is known.
    if finding.result == DIFFERS:
        tell(f"{chosen.name} version {chosen.number} {DIFFERS}", message)
        return Failed(message=message)
    return Completed(name=finding.result.capitalize(), message=message)


def main() -> None:
    """Exit code 0 if the version was reproduced, 130 if stopped, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", type=int, help="its number (default: the one in force, else the newest)")
    number = parser.parse_args().version
    with reachable():
        choose(load_section("register", Register).name, number)  # a refusal should not cost Prefect's start first
    state = run_flow(verify, number)
    print(state.message)
    if state.name != REPRODUCED.capitalize():
        sys.exit(1)


if __name__ == "__main__":
    run(main)
