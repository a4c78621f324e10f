"""The examination of a registered version by `python -m stages.examine`, which loads it in a process of its own."""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.processes.flow_lock import folder
from stages.registry.versions import Version
from stages.runtime.command import StageError


@dataclass(frozen=True)
class ExaminationResult:
    """What `python -m stages.examine` found."""

    sound: bool
    """The weights are those that were registered, and predict as they did then."""
    gate: str
    """Its verdict against the version in force now; that of its registration where that still holds."""
    reasons: tuple[str, ...]


def examine(version: Version, against: str, run: Callable[[Sequence[str]], object]) -> ExaminationResult:
    """Examines a registered version in a process of its own, which loads it.

    Args:
        against: what its gate must have been taken against: a version's number, or `none`; empty for no gate.
        run: runs a command, and raises StageError where that fails.

    Raises:
        StageError: the examination itself could not be done.
    """
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary, "result.json")
        command = [sys.executable, "-m", "stages.examine", version.name, str(version.number), "--json", str(result)]
        try:
            # The newest version's data is in the tree where it was trained, not in this checkout.
            data = ["--data", str(folder("retrain") / "tree")]
            run([*command, *(["--against", against, *data] if against else [])])
        except StageError as error:
            raise StageError(f"version {version.number} was not examined: {error}") from error
        content = json.loads(result.read_text(encoding="utf-8"))
    return ExaminationResult(content["sound"], content["gate"], tuple(content["reasons"]))
