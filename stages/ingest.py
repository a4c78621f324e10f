"""ingest: images of any source -> data/raw/<role>/<batch>/, deterministic tars with the original bytes as they came."""

import argparse
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from stages.command import StageError, run
from stages.data.digests import digest
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
        tars = list(progress(pool.map(partial(write_tar, folder=aside), groups), len(groups), f"ingest {name}"))
        files = [file for tar in tars for file in tar]
        if not files:
            raise StageError(f"source {batch.source} of batch {name} holds no file")
        if batch.digest and digest(files) != batch.digest:
            raise StageError(
                f"source {batch.source} is not what batch {name} was accepted with (its digest differs). A delivery is "
                f"never changed: put it back as it was, `dvc pull` the raw data, or deliver it under a new name"
            )
    logger.info("ingest %s: %d files in %d tars", name, len(files), len(tars))


if __name__ == "__main__":
    run(main)
