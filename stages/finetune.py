"""finetune: the backbone and the shards of the target -> models/finetuned/, and models/scratch/ to compare with."""

import argparse
from pathlib import Path

from stages.params.finetune import Finetune
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.registry.runs import training_run
from stages.runtime.command import run
from stages.runtime.params_file import load_section


def main() -> None:
    """Trains the target model from the backbone, then from random weights with the same recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--trial",
        type=Path,
        metavar="DIR",
        help="one trial of a search: all that it writes lies there (pipelines.tune)",
    )
    trial = parser.parse_args().trial
    finetune = load_section("finetune", Finetune)
    model = load_section("model", Model)
    training = load_section("training", Training)

    from stages.training.finetuning.finetuning import finetune_target

    finetune_target(finetune, model, training, training_run, trial)


if __name__ == "__main__":
    run(main)
