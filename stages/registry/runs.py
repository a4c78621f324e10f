"""Runs in MLflow, which only observe: nothing that is logged or answered enters a DVC output.

So training ends in the same bytes with tracking switched off (SYNSET_TRACKING=off) and with a server that is down.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.registry.client import enabled

EXPERIMENTS = "synset/{stage}"
PARENT = "SYNSET_PARENT_RUN"
"""In the environment of a trial: the run of its search."""


class TrainingRun:
    """A run that records nothing: tracking is switched off, or MLflow failed when it was to begin."""

    run_id = ""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of one step (an epoch), in one request."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; a later value replaces an earlier one."""

    def log_artifacts(self, folder: Path) -> None:
        """The files of `folder`, under the folder's name."""

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""


@contextmanager
def training_run(
    stage: str, params: Mapping[str, Any], tags: Mapping[str, str], resumed: bool = False
) -> Iterator[TrainingRun]:
    """A run in the experiment synset/<stage>, with params flattened, git facts, shard sets and system metrics.

    With tracking switched off, or where MLflow fails, the run records nothing, and nothing is raised.

    Args:
        resumed: training resumes its own checkpoint, so its run is resumed too: the newest with the same tag
            `fingerprint` that is not FINISHED. Otherwise a new run begins: an unfinished one may belong to a process
            that is still at work elsewhere.
    """
    if not enabled():
        yield TrainingRun()
        return
    from stages.registry.recording import recorded

    with recorded(stage, params, tags, resumed) as run:
        yield run


def search_run(params: Mapping[str, Any], study: str) -> TrainingRun:
    """The run of a search, the parent of its trials' runs: the one begun before for this study, or a new one."""
    if not enabled():
        return TrainingRun()
    from stages.registry.recording import begin_search

    return begin_search(params, study)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections with dotted keys: `{"finetune": {"lr": 0.1}}` becomes `{"finetune.lr": 0.1}`."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
