"""`python -m pipelines.reproduce`: `dvc repro` as a Prefect flow, one task per stage.

What has to run is DVC's to decide: every task calls `dvc repro` for one stage of dvc.yaml. Prefect adds the log, the
durations and the stop.
"""

import argparse
import time
from typing import Any

from pipelines import environment
from pipelines.processes.flow_run import flow_stop, run_flow, run_stage, stage_names
from pipelines.processes.stage_process import signals_to
from pipelines.summary import summary_rows
from stages.params.all import check_all
from stages.runtime.command import StageError, run

environment.apply()  # Prefect reads its settings when it is imported

from prefect import flow  # noqa: E402
from prefect.artifacts import create_markdown_artifact, create_table_artifact  # noqa: E402
from prefect.states import Cancelled, Completed, Failed, State  # noqa: E402


@flow(name="reproduce", persist_result=False)
def reproduce() -> State[Any]:
    """Every stage of dvc.yaml in order; the first that fails, or a request to stop, ends the flow."""
    stop = flow_stop()
    durations: list[dict[str, Any]] = []
    with signals_to(stop):
        try:
            check_all()  # DVC would drop a batch with a bad name without a word
        except StageError as error:
            return Failed(message=str(error))
        for stage in stage_names():
            start = time.monotonic()
            state = run_stage.with_options(name=stage, task_run_name=stage)(stage, stop, return_state=True)
            durations.append({"stage": stage, "seconds": round(time.monotonic() - start, 1), "ended": state.message})
            if not state.is_completed():
                break
        create_table_artifact(key="durations", table=durations, description="Seconds a stage, DVC's own included")
        if not state.is_completed():
            # A new state: from the task's own, Prefect would only report that "1/1 states failed".
            return (Cancelled if state.is_cancelled() else Failed)(message=state.message)
        create_markdown_artifact(key="result", markdown=_result_table())
    return Completed(message="every stage is up to date")


def _result_table() -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary_rows())
    return f"| | |\n|---|---|\n{rows}\n"


def main() -> None:
    """Exit code 0 if every stage is up to date, 130 if stopped, else 1."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    check_all()  # a typing error should not cost Prefect's start first
    run_flow(reproduce)


if __name__ == "__main__":
    run(main)
