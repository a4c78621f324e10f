"""What a model was made from: its run, its shard sets, its commit."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from stages.registry.client import is_missing, open_client
from stages.registry.mlflow_types import Run
from stages.registry.runs import EXPERIMENTS
from stages.registry.tags import COMMIT, DIRTY, MODEL_SHA256
from stages.runtime.git import GitError, git
from stages.runtime.layout import SHARDS

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------ runs


def find_run(model_sha256: str) -> Run | None:
    """The newest run of `finetune` that ended in the model with these weights."""
    return next(iter(_newest("finetune", f"tags.`{MODEL_SHA256}` = '{model_sha256}'", 1)), None)


def newest_runs(stage: str, count: int = 10) -> list[Run]:
    """The newest finished runs of a stage, newest first."""
    return _newest(stage, "attributes.status = 'FINISHED'", count)


def _newest(stage: str, which: str, count: int) -> list[Run]:
    client = open_client()
    experiment = client.get_experiment_by_name(EXPERIMENTS.format(stage=stage))
    if not experiment:
        return []
    newest_first = ["attributes.start_time DESC"]
    return list(client.search_runs([experiment.experiment_id], which, max_results=count, order_by=newest_first))


def get_run(run_id: str) -> Run | None:
    """The run with this id; None where it is gone."""
    try:
        return open_client().get_run(run_id) if run_id else None
    except Exception as error:
        if is_missing(error):
            return None
        raise


# ------------------------------------------------------------------------------------------------------ shard sets


@dataclass(frozen=True)
class ShardSet:
    """The data of one batch as training reads it."""

    batch: str
    folder: Path
    sha256: str
    """Of its index.json, which holds the shards' digests."""
    counts: dict[str, int]
    """Images by split."""

    @property
    def digest(self) -> str:
        """The beginning of `sha256`, as much as MLflow accepts for a dataset; its profile holds the whole."""
        return self.sha256[:36]


def training_data(role: str, checkout: Path = Path()) -> list[ShardSet]:
    """All shard sets of a role that lie under data/shards/, by name of batch."""
    found = []
    for index in sorted((checkout / SHARDS / role).glob("[!.]*/index.json")):  # dot: half-made
        content = index.read_bytes()
        splits = json.loads(content).get("splits", {})
        counts = {split: int(facts["count"]) for split, facts in splits.items()}
        found.append(ShardSet(index.parent.name, index.parent, hashlib.sha256(content).hexdigest(), counts))
    return found


def training_data_of(run: Run, checkout: Path) -> list[ShardSet]:
    """The shard sets in a checkout that a run of `finetune` was made from: the same images, written the same way."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    digests = {each.dataset.name: each.dataset.digest for each in inputs}
    return [each for each in training_data("finetune", checkout) if digests.get(each.batch) == each.digest]


def data_fingerprint() -> str:
    """sha256 over the shard sets of both roles: the same for the same training and test data, whatever the machine."""
    sets = [(role, each.batch, each.sha256) for role in ("pretrain", "finetune") for each in training_data(role)]
    return hashlib.sha256(json.dumps(sets).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- commit


def git_tags() -> dict[str, str]:
    """`git.commit`, and `git.dirty` where the tree differs from it. Empty where this is no root of a repository.

    dvc.lock and reports/ do not count: they are what `dvc repro` writes, so they differ while it runs.
    """
    try:
        commit = git(Path(), "rev-parse", "--verify", "HEAD")
        changed = git(Path(), "status", "--porcelain", "--", ".", ":!dvc.lock", ":!reports")
    except GitError as error:
        logger.info("no git.commit is recorded: %s", error)
        return {}
    return {COMMIT: commit} | ({DIRTY: "true"} if changed else {})
