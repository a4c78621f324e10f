"""ingest: images of any source -> data/raw/<role>/<batch>/, deterministic tars with the original bytes as they came.

`--look SOURCE` writes nothing: it prints what ingest would understand of a source, before params.yaml names it.
"""

import argparse

from stages.params.batches import load_batch, load_batches
from stages.runtime import layout
from stages.runtime.command import run


def main() -> None:
    """Reads the source of one batch and writes its raw tars; or prints what it would understand of a source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("batch", nargs="?", help="name of the batch in params.yaml")
    what.add_argument("--look", metavar="SOURCE", help="a folder, archive, URL, ...: as in params.yaml, or a path")
    given = parser.parse_args()
    if given.look is not None:
        from stages.data.sources.preview import preview

        print(preview(given.look, layout.incoming()))
        return
    name = given.batch
    batch = load_batch(name)
    from stages.data.sources.ingesting import ingest

    first = next(name for name, each in load_batches().items() if each.role == batch.role)
    ingest(name, batch, is_first=name == first)


if __name__ == "__main__":
    run(main)
