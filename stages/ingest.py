"""ingest: images of any source -> data/raw/<role>/<batch>/, deterministic tars with the original bytes as they came."""

import argparse

from stages.params.batches import load_batch
from stages.runtime.command import run


def main() -> None:
    """Reads the source of one batch and writes its raw tars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    batch = load_batch(name)
    from stages.data.sources.ingesting import ingest

    ingest(name, batch)


if __name__ == "__main__":
    run(main)
