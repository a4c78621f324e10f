"""validate: all facts -> accepted and quarantined images, classes, and a page that says why."""

import argparse
import logging

from stages.params.batches import load_batches
from stages.params.split import Split
from stages.params.validate import Validate
from stages.runtime.command import run
from stages.runtime.params_file import load_section


def main() -> None:
    """Judges all batches together; stops where they are not fit for training."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.getLogger("great_expectations").setLevel(logging.WARNING)  # at level INFO it narrates its own import
    from stages.data.validation.validating import validate

    validate(load_batches(), load_section("split", Split), load_section("validate", Validate))


if __name__ == "__main__":
    run(main)
