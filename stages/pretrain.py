"""pretrain: shards of the pretrain batches -> models/backbone/, the weights that fine-tuning starts from."""

import argparse

from stages.params.pretrain import Pretrain
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.registry.runs import training_run
from stages.runtime.command import run
from stages.runtime.params_file import load_section


def main() -> None:
    """Trains the backbone, or writes it untrained where `method` is none."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    pretrain = load_section("pretrain", Pretrain)
    model = load_section("model", Model)
    training = load_section("training", Training)

    from stages.training.pretraining import pretrain_backbone

    pretrain_backbone(pretrain, model, training, record=training_run)


if __name__ == "__main__":
    run(main)
