"""ingest: images of any source -> data/raw/<role>/<batch>/, deterministic tars with the original bytes as they came."""

import argparse
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from stages.command import StageError, run
from stages.data.ingesting import write_tar
from stages.data.sources import read_source
from stages.files import replaced_directory
from stages.params.batches import load_batch
from stages.progress import progress, worker_count

logger = logging.getLogger(__name__)


def main() -> None:
    """Reads the source of one batch and writes its raw tars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    batch = load_batch(name)
    groups = list(read_source(batch.source, Path(os.environ.get("SYNSET_INCOMING", "data/incoming"))))
    out = Path("data/raw") / batch.role / name
    with replaced_directory(out) as aside, ThreadPoolExecutor(worker_count()) as pool:
        counts = list(progress(pool.map(partial(write_tar, folder=aside), groups), len(groups), f"ingest {name}"))
        if not sum(counts):
            raise StageError(f"source {batch.source} of batch {name} holds no file")
    logger.info("ingest %s: %d files in %d tars", name, sum(counts), len(counts))


if __name__ == "__main__":
    run(main)
