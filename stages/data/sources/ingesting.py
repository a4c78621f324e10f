"""Ingests one batch: reads its source and writes its raw tars."""

import logging
import shutil
from collections.abc import Iterable

from stages.data.sources.account import Seen, account, as_text
from stages.data.sources.digests import raw_digest
from stages.data.sources.dispatch import read_source
from stages.data.sources.fitness import check_fitness
from stages.data.sources.tar_writing import Made, Tally, assemble, shown, write_parts
from stages.data.sources.tars import ChangedError
from stages.params.batches import Batch
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import replaced_directory, write_json
from stages.runtime.fingerprint import fingerprint, prune, work_folder
from stages.runtime.progress import worker_count

logger = logging.getLogger(__name__)
WAITING = 4
"""How many parts of a remote source are read per core: most of the time they wait for the store."""


def ingest(name: str, batch: Batch, is_first: bool = True) -> None:
    """Writes the raw tars of a batch, from where a killed run left off.

    `is_first`: of its role. Later ones to fine-tune on may be of one class, if only that has new images.

    Raises:
        StageError: there is no such source, or it is damaged, empty, without labels that the batch needs, or not the
            one that the batch was accepted with.
    """
    source = read_source(batch.source, layout.incoming())
    work = work_folder(f"ingest@{name}", fingerprint(f"ingest@{name}", source=source.listing))
    prune(work.parent, work)
    tally = Tally()
    try:
        with shown(tally, f"ingest {name}"):
            workers = worker_count() * (WAITING if source.is_remote else 1)
            made, seen = _joined(write_parts(source, work, workers, tally))
    except ChangedError:
        shutil.rmtree(work)
        raise
    check_fitness(source, seen, batch.role, is_first)
    of_source = account(source, seen)
    with replaced_directory(layout.raw(batch.role, name)) as aside:
        write_json(aside / layout.ACCOUNT, of_source)
        count = assemble([made[part] for part in sorted(made)], work, aside)
        if batch.digest and raw_digest(aside) != batch.digest:
            shutil.rmtree(work)
            raise StageError(
                f"source {batch.source} is not what batch {name} was accepted with (its digest differs). A delivery is "
                f"never changed: put it back as it was, `dvc pull` the raw data, or deliver it under a new name"
            )
    shutil.rmtree(work)
    logger.info("ingest %s: %d files in %d tars, understood as\n%s", name, tally.images, count, as_text(of_source))


def _joined(parts: Iterable[tuple[int, Made]]) -> tuple[dict[int, Made], Seen]:
    """All parts by number, and what they held: joined in their order as soon as possible, as each holds all classes."""
    made: dict[int, Made] = {}
    seen, joined = Seen(), 0
    for number, part in parts:
        made[number] = part
        while joined in made:
            seen.join(made[joined].seen)
            made[joined] = made[joined]._replace(seen=Seen())
            joined += 1
    return made, seen
