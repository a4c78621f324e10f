"""shard: accepted images of a batch -> data/shards/<role>/<batch>/, shuffled tar shards with DALI index files."""

import argparse
import logging
from pathlib import Path

import pandas as pd

from stages.data.parallel.crash_safe_pool import alone
from stages.data.shards.writing import COLUMNS, write_shard_set
from stages.params.batches import load_batch
from stages.params.shard import Shards
from stages.runtime.command import StageError, run
from stages.runtime.fingerprint import fingerprint, prune, work_folder
from stages.runtime.params_file import load_section

logger = logging.getLogger(__name__)


def main() -> None:
    """Writes the shard set of one batch, from where an interrupted run of the same left off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    role = load_batch(name).role
    shards = load_section("shard", Shards)
    accepted = _read_accepted(Path("data/accepted") / role / f"{name}.parquet")
    if accepted.empty:
        raise StageError(f"no image of batch {name} was accepted; reports/validation.html says why")
    work = work_folder(f"shard@{name}", fingerprint(f"shard@{name}"))
    raw, out = (Path("data") / kind / role / name for kind in ("raw", "shards"))
    with alone(work.parent):
        prune(work.parent, keep=work)
        count = write_shard_set(accepted, raw, out, getattr(shards, role), role, name, work, shards.cluster)
    logger.info("shard %s: %d images", name, count)


def _read_accepted(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, columns=[*COLUMNS, "split"])
    except FileNotFoundError:
        raise StageError(f"{path} is missing; `dvc repro validate` makes it, `dvc pull` brings it") from None


if __name__ == "__main__":
    run(main)
