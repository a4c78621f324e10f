"""shard: accepted images of a batch -> data/shards/<role>/<batch>/, shuffled tar shards with DALI index files."""

import argparse
import logging
from pathlib import Path

from stages.command import StageError, run
from stages.data.facts import read_table
from stages.data.sharding import write_shard_set
from stages.files import replaced_directory
from stages.params.batches import load_batch
from stages.params.load import load_section
from stages.params.shard import Shard

logger = logging.getLogger(__name__)


def main() -> None:
    """Writes the shard set of one batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    role = load_batch(name).role
    shard = load_section(f"shard.{role}", Shard)
    accepted = read_table(Path("data/accepted") / role / f"{name}.parquet")
    if accepted.empty:
        raise StageError(f"no image of batch {name} was accepted; reports/validation.html says why")
    with replaced_directory(Path("data/shards") / role / name) as aside:
        count = write_shard_set(accepted, Path("data/raw") / role / name, aside, shard, role, name)
    logger.info("shard %s: %d images", name, count)


if __name__ == "__main__":
    run(main)
