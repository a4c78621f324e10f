"""ingest: images of any source -> data/raw/<role>/<batch>/, deterministic tars with the original bytes as they came."""

import argparse
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from stages.data.raw.tars import UNLABELLED
from stages.data.sources.digests import raw_digest
from stages.data.sources.dispatch import read_source
from stages.data.sources.ingesting import Made, Tally, assemble, shown, write_parts
from stages.data.sources.tars import ChangedError
from stages.params.batches import load_batch
from stages.runtime.command import StageError, run
from stages.runtime.files import replaced_directory
from stages.runtime.fingerprint import fingerprint, prune, work_folder
from stages.runtime.progress import worker_count

logger = logging.getLogger(__name__)
WAITING = 4
"""How many parts of a remote source a core reads at a time."""


def main() -> None:
    """Reads the source of one batch and writes its raw tars; a run that was killed is taken up where it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    batch = load_batch(name)
    source = read_source(batch.source, os.environ.get("SYNSET_INCOMING", "data/incoming"))
    work = work_folder(f"ingest@{name}", fingerprint(f"ingest@{name}", source=source.listing))
    prune(work.parent, work)
    tally = Tally()
    try:
        with shown(tally, f"ingest {name}"):
            # A store far away is waited for more than computed with.
            workers = worker_count() * (WAITING if source.is_remote else 1)
            made = dict(write_parts(source, work, workers, tally))
    except ChangedError:
        shutil.rmtree(work)
        raise
    source.check_classes(each for part in made.values() for each in part.classes)
    if not tally.images:
        raise StageError(f"source {batch.source} of batch {name} holds no file")
    if batch.role == "finetune" and all(tar.startswith(UNLABELLED) for part in made.values() for tar in part.tars):
        raise StageError(f"source {batch.source} has no labels, and batch {name} is to fine-tune on: role: pretrain")
    with replaced_directory(Path("data/raw") / batch.role / name) as aside:
        count = assemble([made[part] for part in sorted(made)], work, aside)
        if batch.digest and raw_digest(aside) != batch.digest:
            shutil.rmtree(work)
            raise StageError(
                f"source {batch.source} is not what batch {name} was accepted with (its digest differs). A delivery is "
                f"never changed: put it back as it was, `dvc pull` the raw data, or deliver it under a new name"
            )
    shutil.rmtree(work)
    logger.info("ingest %s: %d files in %d tars%s", name, tally.images, count, _without_labels(made.values()))


def _without_labels(made: Iterable[Made]) -> str:
    """Said even where it is meant: an archive read as another layout than its owner thinks has lost its labels."""
    images = sum(part.images for part in made if all(tar.startswith(UNLABELLED) for tar in part.tars))
    return f", {images} of them without a label" if images else ""


if __name__ == "__main__":
    run(main)
