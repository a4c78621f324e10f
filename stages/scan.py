"""scan: data/raw/<role>/<batch>/ -> data/facts/<role>/<batch>.parquet, a row an image of what it is."""

import argparse
import logging
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd

from stages.command import StageError, run
from stages.data.facts import FACTS, write_table
from stages.data.raw import raw_tars
from stages.data.scanning import scan_tar
from stages.params.batches import load_batch
from stages.progress import progress, worker_count

logger = logging.getLogger(__name__)


def main() -> None:
    """Scans the raw tars of one batch in parallel; rows are in the order of the tars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    role = load_batch(name).role
    folder = Path("data/raw") / role / name
    tars = raw_tars(folder)
    if not tars:
        raise StageError(f"{folder} holds no raw tars; `dvc repro ingest@{name}` makes them, `dvc pull` brings them")
    with ProcessPoolExecutor(worker_count()) as pool:
        scans = pool.map(partial(scan_tar, folder=folder, batch=name), tars)
        rows = [row for tar_rows in progress(scans, len(tars), f"scan {name}") for row in tar_rows]
    facts = pd.DataFrame(rows, columns=FACTS.names)
    write_table(facts, FACTS, Path("data/facts") / role / f"{name}.parquet")
    logger.info("scan %s: %d files, %d do not decode", name, len(facts), (~facts["decodes"]).sum())


if __name__ == "__main__":
    run(main)
