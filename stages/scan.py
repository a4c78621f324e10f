"""scan: data/raw/<role>/<batch>/ -> data/facts/<role>/<batch>.parquet, one row per image."""

import argparse

from stages.params.batches import load_batch
from stages.runtime.command import run


def main() -> None:
    """Scans the raw tars of one batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", help="name of the batch in params.yaml")
    name = parser.parse_args().batch
    role = load_batch(name).role
    from stages.data.scanning import scan

    scan(name, role)


if __name__ == "__main__":
    run(main)
