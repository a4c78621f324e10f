"""Which images of a delivery to label first: those that models/finetuned is unsure of, and no two of them alike.

The model predicts for all images without a label in the shards of BATCH, whatever their split. Writes queue.csv, a row
an image in the order in which to label them, and queue.html, a contact sheet that needs nothing but a browser.
"""

import argparse
from pathlib import Path

from stages.params.evaluate import Evaluate
from stages.params.training.training import Training
from stages.runtime import layout
from stages.runtime.command import positive, run
from stages.runtime.params_file import load_section


def main() -> None:
    """Predicts, and writes both files."""
    arguments = _arguments()
    from stages.evaluation.label_queue import write_queue

    batch, out = arguments.batch, arguments.out or layout.LABEL_QUEUE / arguments.batch
    batch_size = load_section("evaluate", Evaluate).batch_size
    training = load_section("training", Training)
    write_queue(batch, arguments.count, arguments.seed, out, training, batch_size)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", metavar="BATCH", help="a batch of params.yaml, of either role")
    parser.add_argument("--count", type=positive, default=100, help="images asked for (%(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"default: {layout.LABEL_QUEUE}/BATCH, which git ignores"
    )
    parser.add_argument("--seed", type=positive, default=1, help="of the draw among the candidates (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
