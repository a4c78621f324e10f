"""When a training writes a checkpoint, how it resumes from one, and how it stops on a signal."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.runtime.command import StageError
from stages.runtime.files import write_text
from stages.training.loop.checkpoints.file import load_checkpoint, save_checkpoint
from stages.training.loop.processes import StopSignals, is_first
from stages.training.loop.state import State

logger = logging.getLogger(__name__)
CHECKPOINT_STEPS = "SYNSET_CHECKPOINT_STEPS"
"""Steps between two checkpoints. Not a parameter: it never changes bytes, so it must not make DVC run again."""


def resume(state: State, work: Path, name: str) -> None:
    """Restores `state` from the checkpoint in `work`, if there is one."""
    saved = load_checkpoint(_checkpoint(work))
    if saved is None:
        return
    state.load_state_dict(saved)
    if is_first():
        logger.info("%s: going on after step %d of epoch %d", name, state.step, state.epoch)


class Checkpointer:
    """Saves `State`: every `CHECKPOINT_STEPS` steps, when a signal asks to stop, and at the end."""

    def __init__(self, state: State, work: Path, signals: StopSignals, name: str) -> None:
        self.state, self.work, self.signals, self.name = state, work, signals, name
        self.every = _checkpoint_steps()

    def due(self) -> bool:
        """Whether the state after this step is to be saved."""
        return bool(self.signals.came) or self.state.steps_done % self.every == 0

    def stop_if_asked(self) -> None:
        """Ends this process where a signal came. Process 0 decides: the others are stopped when it ends."""
        if self.signals.came and is_first():
            place = self.state.step, self.state.epoch
            logger.info("%s: stopped after step %d of epoch %d; run again to go on", self.name, *place)
            sys.exit(128 + self.signals.came)

    @contextmanager
    def saving_when_stopped(self) -> Iterator[None]:
        """For work that does not change the state: a signal stops it at once, and a later run does it again."""
        try:
            with self.signals.at_once():
                yield
        except SystemExit:
            self.save()
            raise

    def save(self) -> None:
        """All processes hold the same state except batch-norm statistics; process 0's are saved."""
        if is_first():
            save_checkpoint(_checkpoint(self.work), self.state.state_dict())

    def write_progress(self) -> None:
        """The curve so far, a line an epoch."""
        if is_first():
            lines = (json.dumps(metrics) + "\n" for metrics in self.state.curve)
            write_text(self.work / "progress.jsonl", "".join(lines))

    def last_good(self) -> str:
        """Which checkpoint is left after an error, for its message."""
        path = _checkpoint(self.work)
        if not path.is_file():
            return "No checkpoint had been written yet"
        return f"The last good checkpoint stays in {path} until an epoch is trained with other parameters"


def _checkpoint(work: Path) -> Path:
    return work / "checkpoint.pt"


def _checkpoint_steps() -> int:
    steps = os.environ.get(CHECKPOINT_STEPS) or "200"
    if not steps.isdecimal() or not int(steps):
        raise StageError(f"{CHECKPOINT_STEPS} must be a number of steps, got {steps!r}")
    return int(steps)
