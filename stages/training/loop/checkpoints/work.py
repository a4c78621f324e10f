"""The work folder of a training; `training.allow_inexact` takes over that of another world size."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from stages.params.training.training import Training
from stages.runtime.files import write_json
from stages.runtime.fingerprint import fingerprint, prune, work_folder
from stages.training.loop.processes import is_first, wait_for_first

logger = logging.getLogger(__name__)
NOT_LINEAGE = ("training.world_size", "training.nodes", "training.allow_inexact")
"""Parameters that may change when a checkpoint is resumed."""


@dataclass(frozen=True)
class TrainingWork:
    """Where a training keeps its checkpoints, and who worked on it."""

    folder: Path
    stamp: str
    """The fingerprint."""
    machine: str
    world_sizes: tuple[int, ...]
    """World sizes that it was trained with, in order."""
    resumed: bool

    @property
    def tags(self) -> dict[str, str]:
        """For MLflow."""
        return {"fingerprint": self.stamp, "machine": self.machine} | {
            key: str(value) for key, value in self.recorded.items()
        }

    @property
    def recorded(self) -> dict[str, list[int]]:
        """For the report: empty unless the world size changed, so that no undisturbed run has these bytes."""
        return {"inexact_world_sizes": list(self.world_sizes)} if len(self.world_sizes) > 1 else {}

    def prune(self) -> None:
        """Removes work of other parameters, once an epoch of this training is done.

        Not before: a mistyped parameter that ends in a message must not cost the checkpoint of the right ones.
        """
        prune(self.folder.parent, keep=self.folder)

    def remove(self) -> None:
        """Removes all work of the stage, once it has finished."""
        prune(self.folder.parent, keep=Path())


def training_work(stage: str, machine: str, training: Training, source: str = "") -> TrainingWork:
    """The work folder of `stage` as it is configured now; process 0 creates it.

    Args:
        machine: the kind of machine that decides bytes.
        source: checksum of what training starts from besides the stage's dependencies.
    """
    stamp = fingerprint(stage, machine, source)
    folder = work_folder(stage, stamp)
    lineage = fingerprint(stage, machine, source, without=NOT_LINEAGE)
    resumed = folder.is_dir()
    wait_for_first()  # all have looked
    if is_first():
        if not resumed and training.allow_inexact and (other := _of_lineage(folder.parent, lineage)):
            other.rename(folder)
            if _world_sizes(folder)[-1] != training.world_size:
                logger.warning(
                    "warning: %s goes on from a checkpoint of another world size: its bytes are its own", stage
                )
        sizes = _world_sizes(folder)
        if sizes[-1:] != [training.world_size]:
            write_json(folder / "lineage.json", {"lineage": lineage, "world_sizes": [*sizes, training.world_size]})
    wait_for_first()  # it is made
    return TrainingWork(folder, stamp, machine, tuple(_world_sizes(folder)), resumed)


def _of_lineage(stage_work: Path, lineage: str) -> Path | None:
    """The folder with the newest checkpoint of this lineage."""
    written: dict[Path, int] = {}
    for path in stage_work.glob("*/lineage.json"):
        if json.loads(path.read_text(encoding="utf-8"))["lineage"] == lineage:
            times = [each.stat().st_mtime_ns for each in path.parent.rglob("checkpoint.pt")]
            written |= {path.parent: max(times)} if times else {}
    return max(written, key=written.__getitem__) if written else None


def _world_sizes(folder: Path) -> list[int]:
    path = folder / "lineage.json"
    return json.loads(path.read_text(encoding="utf-8"))["world_sizes"] if path.is_file() else []
