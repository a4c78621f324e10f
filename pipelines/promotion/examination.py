"""The examination of a registered version by `python -m stages.examine`, which loads it in a process of its own."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.processes.flow_lock import folder
from stages.registry.examination import Examination
from stages.registry.versions import Version
from stages.runtime.command import StageError


def examine(version: Version, against: str, run: Callable[[Sequence[str]], object]) -> Examination:
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
        return Examination.read(result)
