"""Predicts with a registered model for image files, folders and tars; writes a row for each image, as CSV or Parquet.

Folders are read with all that is below them, tars within them too; hidden files are left out. An image that cannot be
read has a row as well, which says why. Files that are no images, by name and by content, are only counted.
"""

import argparse
from pathlib import Path

from stages.params.register import Register
from stages.runtime import layout
from stages.runtime.command import positive, run
from stages.runtime.params_file import load_section


def main() -> None:
    """Finds the model, then the images."""
    arguments = parse()
    from stages.registry.predicting import predict_files

    address = arguments.model or f"models:/{load_section('register', Register).name}@serving"
    predict_files(arguments.images, address, arguments.out, arguments.top_k, arguments.batch_size)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files, folders, tars")
    parser.add_argument(
        "--model", help="models:/NAME@ALIAS or models:/NAME/VERSION; default: the one in force, of `register.name`"
    )
    # By default where git does not look: a file beside params.yaml would make the checkout dirty (`git.dirty`).
    parser.add_argument("--out", type=Path, default=layout.PREDICTED, help="a .csv or .parquet file (%(default)s)")
    parser.add_argument("--top-k", type=positive, default=5, help="classes for each image, best first (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, help="images asked about at once (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
