"""`python -m pipelines.reconcile`: promotes the version that a person chose, or refuses it; scheduled, once a minute.

A person sets the alias `champion` in the MLflow UI. If the version passed its gate and predicts as it did when it was
registered, it comes into force: it gets `serving`, the alias that `make serve` loads. Otherwise `champion` goes back.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import environment
from pipelines.environment import ROOT
from pipelines.notify import tell
from pipelines.processes.flow_lock import BusyError, clear_after_kill, exclusive, folder
from pipelines.processes.flow_run import run_flow, run_logged
from pipelines.processes.stage_process import Stop, signals_to
from pipelines.promotion.examination import examine
from pipelines.promotion.promotion import Outcome, settle
from stages.params.register import Register
from stages.registry.client import is_server, reachable, tracking_uri
from stages.registry.links import version_link
from stages.runtime.command import StageError, run
from stages.runtime.params_file import load_section

environment.apply()  # Prefect reads its settings when it is imported

from prefect import flow, get_run_logger, runtime  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.states import Cancelled, Completed, Failed, State  # noqa: E402

NAME = "reconcile"


@flow(name=NAME, persist_result=False)
def reconcile() -> State[Any]:
    """Reads the registry once, and does what follows from it."""
    logger = get_run_logger()
    stop = Stop()
    try:
        clear_after_kill("retrain")
        name = load_section("register", Register).name
        with exclusive(NAME, str(runtime.flow_run.id)), signals_to(stop), reachable():
            examination = partial(examine, run=partial(run_logged, stop=stop))
            outcome = settle(name, examination, partial(_tell, name), ROOT)
    except BusyError as error:
        return Completed(name="Skipped", message=str(error))
    except Exception as error:
        if stop.requested():
            return Cancelled(message=str(error))
        _tell_failure(str(error))
        if isinstance(error, StageError):
            return Failed(message=str(error))
        raise
    _failure_file().unlink(missing_ok=True)
    logger.info(outcome.message)
    return Completed(name=outcome.kind.capitalize(), message=outcome.message)


def _tell(name: str, outcome: Outcome) -> None:
    uri = tracking_uri()
    link = version_link(name, outcome.version or 0, uri.rstrip("/")) if is_server(uri) else ""
    text = f"{outcome.message}\n\n[its page]({link})\n" if link else f"{outcome.message}\n"
    tell(f"{name}: version {outcome.version} {outcome.kind}", text)
    create_markdown_artifact(key=NAME, markdown=text)


def _tell_failure(message: str) -> None:
    """Notifies once, not every minute of a night; again after a run that succeeded, or when the error is another."""
    path = _failure_file()
    if not path.exists() or path.read_text(encoding="utf-8") != message:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(message, encoding="utf-8")
        tell("reconcile failed", f"{message}\n\nIt is tried again; until then nothing changes in what is in force.\n")


def _failure_file() -> Path:
    return folder(NAME) / "failure"


def main() -> None:
    """Exit code 0 if the registry is settled, or another run is at it; 130 if stopped, else 1."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    load_section("register", Register)  # a typing error should not cost Prefect's start first
    print(run_flow(reconcile).message)


if __name__ == "__main__":
    run(main)
