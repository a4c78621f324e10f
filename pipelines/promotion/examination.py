"""Commands that flows run with their output in the flow's log; first of all `python -m stages.examine`."""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.processes.flow_lock import folder
from pipelines.processes.stage_process import Stop, run_streamed
from stages.registry.versions import Version
from stages.runtime.command import StageError


@dataclass(frozen=True)
class Examination:
    """What `python -m stages.examine` found."""

    sound: bool
    """The weights are those that were registered, and answer as they did then."""
    gate: str
    """Its verdict against the version in force now; that of its registration where that still holds."""
    reasons: tuple[str, ...]


def run_logged(
    command: Sequence[str], stop: Stop, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> list[str]:
    """Runs a command from within a flow, as `run_streamed` does; returns its lines.

    Raises:
        StageError: it failed, with its own last error; or it was stopped.
    """
    from prefect import get_run_logger

    from pipelines.reproduce import last_error

    logger = get_run_logger()
    lines: list[str] = []

    def on_line(line: str) -> None:
        logger.info(line)
        lines.append(line)

    code = run_streamed(command, on_line, stop, cwd=cwd, env=env)
    if stop.asked():
        raise StageError(str(stop.reason))
    if code:
        raise StageError(last_error(lines))
    return lines


def examine(version: Version, against: str, run: Callable[[Sequence[str]], object]) -> Examination:
    """Looks at a registered version in a process of its own, which loads it.

    Args:
        against: what its gate must have been taken against: a version's number, or `none`; empty for no gate.
        run: runs a command, and raises StageError where that fails.

    Raises:
        StageError: the examination itself could not be done.
    """
    with tempfile.TemporaryDirectory() as temporary:
        found = Path(temporary, "found.json")
        command = [sys.executable, "-m", "stages.examine", version.name, str(version.number), "--json", str(found)]
        try:
            # The newest version's data is where it was trained, and not yet in this checkout.
            data = ["--data", str(folder("retrain") / "tree")]
            run([*command, *(["--against", against, *data] if against else [])])
        except StageError as error:
            raise StageError(f"version {version.number} was not examined: {error}") from error
        content = json.loads(found.read_text(encoding="utf-8"))
    return Examination(content["sound"], content["gate"], tuple(content["reasons"]))
