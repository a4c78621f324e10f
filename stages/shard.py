"""shard: accepted images of a batch -> data/shards/<role>/<batch>/, shuffled tar shards with DALI index files."""

import argparse

from stages.params.batches import load_batch
from stages.params.shard import Shards
from stages.runtime.command import run
from stages.runtime.params_file import load_section


def main() -> None:
    """Writes the shard set of one batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    role, shards = load_batch(name).role, load_section("shard", Shards)
    from stages.data.shards.writing import shard

    shard(name, role, shards)


if __name__ == "__main__":
    run(main)
