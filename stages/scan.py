"""scan: data/raw/<role>/<batch>/ -> data/facts/<role>/<batch>.parquet, a row an image of what it is."""

import argparse
import logging
import shutil
from contextlib import closing
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.data.parallel.crash_safe_pool import alone
from stages.data.raw.facts import FACTS, write_tables
from stages.data.raw.tars import raw_tars
from stages.data.scanning import cut, read_pieces, scan_pieces
from stages.params.batches import load_batch
from stages.runtime.command import StageError, run
from stages.runtime.fingerprint import fingerprint, prune, work_folder
from stages.runtime.progress import progress, worker_count

logger = logging.getLogger(__name__)


def main() -> None:
    """Scans the raw tars of one batch in parallel, from where an interrupted run left off; rows are in their order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    role = load_batch(name).role
    folder = Path("data/raw") / role / name
    tars = raw_tars(folder)
    if not tars:
        raise StageError(f"{folder} holds no raw tars; `dvc repro ingest@{name}` makes them, `dvc pull` brings them")
    work = work_folder(f"scan@{name}", fingerprint(f"scan@{name}"))
    out = Path("data/facts") / role / f"{name}.parquet"
    with alone(work.parent):
        prune(work.parent, keep=work)
        _scan(tars, folder, name, work, out)
        shutil.rmtree(work)
    decodes = pq.ParquetFile(out).read(columns=["decodes"])["decodes"]
    logger.info("scan %s: %d files, %d do not decode", name, len(decodes), pc.sum(pc.invert(decodes)).as_py() or 0)


def _scan(tars: list[Path], folder: Path, batch: str, work: Path, out: Path) -> None:
    pieces = cut(tars, folder, worker_count())
    left = [piece for piece in pieces if not piece.file(work).is_file()]
    if len(left) < len(pieces):
        logger.info("scan %s: goes on after %d of %d pieces", batch, len(pieces) - len(left), len(pieces))
    with closing(scan_pieces(left, folder, batch, work, worker_count())) as done:
        for _ in progress(done, len(left), f"scan {batch}"):
            pass
    write_tables(read_pieces(pieces, work), FACTS, out)


if __name__ == "__main__":
    run(main)
