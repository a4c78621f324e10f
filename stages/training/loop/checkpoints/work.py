"""The work folder of a training: its own checkpoint's, or with `training.allow_inexact` that of another world size."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from stages.params.training.training import Training
from stages.runtime.files import write_json
from stages.runtime.fingerprint import fingerprint, prune, work_folder

logger = logging.getLogger(__name__)
NOT_LINEAGE = ("training.world_size", "training.nodes", "training.allow_inexact")
"""What may differ between two trainings of which one goes on with the other's checkpoint."""


@dataclass(frozen=True)
class TrainingWork:
    """Where a training keeps its checkpoints, and what is known of it."""

    folder: Path
    stamp: str
    """The fingerprint."""
    machine: str
    world_sizes: tuple[int, ...]
    """Of all the processes that worked on it, in order."""
    resumed: bool

    @property
    def tags(self) -> dict[str, str]:
        """For MLflow."""
        return {"fingerprint": self.stamp, "machine": self.machine} | {
            key: str(value) for key, value in self.recorded.items()
        }

    @property
    def recorded(self) -> dict[str, list[int]]:
        """For the report: nothing, unless the result has the bytes of no undisturbed run."""
        return {"inexact_world_sizes": list(self.world_sizes)} if len(self.world_sizes) > 1 else {}

    def prune(self) -> None:
        """Removes work of other parameters, now that training with these has got somewhere.

        Not before: a mistyped parameter that ends in a message must not cost the checkpoint of the right ones.
        """
        prune(self.folder.parent, keep=self.folder)

    def remove(self) -> None:
        """All is done."""
        prune(self.folder.parent, keep=Path())


def training_work(stage: str, machine: str, training: Training, source: str = "") -> TrainingWork:
    """The work folder of `stage` as it is configured now, made by process 0.

    Args:
        machine: the kind of machine that decides bytes.
        source: checksum of what it starts from besides its dependencies.
    """
    from stages.training.loop.processes import is_first, wait_for_first

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
