"""pretrain: shards of the pretrain batches -> models/backbone/, the weights that fine-tuning starts from."""

import argparse
import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.samples.shard_sets import check_resize, pooled_statistics, read_index, shard_sets
from stages.params.pretrain import Pretrain
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.runtime.command import StageError, run
from stages.runtime.files import sha256, write_json
from stages.runtime.fingerprint import prune, work_folder
from stages.runtime.params_file import load_section
from stages.training.loop.checkpoints.work import training_work

if TYPE_CHECKING:
    from stages.training.loop.objectives import Metrics, Objective
    from stages.training.loop.train_batches import Feed
    from stages.training.networks.devices import Compute
    from stages.training.networks.models import Classifier

logger = logging.getLogger(__name__)
BACKBONE = Path("models/backbone")
REPORTS = Path("reports/pretrain")
# torchvision's, for a backbone that saw no image of ours.
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def main() -> None:
    """Trains the backbone, or takes it as it is where `method` is none."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    pretrain = load_section("pretrain", Pretrain)
    model = load_section("model", Model)
    training = load_section("training", Training)

    from stages.training.loop.processes import run_together

    if pretrain.method == "none":
        _untrained(pretrain, model)
    else:
        run_together("stages.pretrain", [], training, partial(_trained, pretrain, model, training))


def _untrained(pretrain: Pretrain, model: Model) -> None:
    from stages.training.networks.models import save_classifier

    config = {"architecture": model.architecture, "stem": model.stem, "classes": [], "image_size": model.image_size}
    config |= {"resize": model.image_size, **(_expected(pretrain, model) or IMAGENET)}
    save_classifier(_start(pretrain, model, config), config, BACKBONE)
    write_json(REPORTS / "metrics.json", {"epochs": []})
    prune(work_folder("pretrain", ""), keep=Path())  # whatever training had begun before
    logger.info("pretrain: %s (`pretrain.method` is none)", pretrain.weights or "a random backbone")


def _trained(pretrain: Pretrain, model: Model, training: Training) -> None:
    from stages.registry.runs import training_run
    from stages.training.loop.loop import fit
    from stages.training.loop.processes import is_first, wait_for_first
    from stages.training.networks.devices import set_up
    from stages.training.networks.layer_groups import every_weight, trainable
    from stages.training.networks.models import save_classifier
    from stages.training.networks.regularisation import regularise

    compute = set_up(training)
    sets = list(shard_sets("pretrain"))
    if not sets:
        raise StageError(
            f"params.yaml: `pretrain.method` is {pretrain.method}, but no batch has the role pretrain; set it to none"
        )
    check_resize(sets, model.image_size)
    config = _config(pretrain, model, sets)
    backbone = _start(pretrain, model, config)
    feed, objective = _task(pretrain, model, sets, config, backbone, compute)
    regularise(backbone, pretrain.dropout, pretrain.stochastic_depth)  # now that a projector may be where the head was
    work = training_work("pretrain", compute.kind, training, source=_weights_file(pretrain))
    params = {"pretrain": pretrain.model_dump(), "model": model.model_dump(), "training": training.model_dump()}
    with training_run("pretrain", params, work.tags, resumed=work.resumed) as tracked:
        groups = every_weight(backbone, pretrain.lr)
        count, share = trainable(backbone)
        tracked.log({"trainable_parameters": count, "trainable_share": share}, 0)

        def end_epoch(metrics: "Metrics", epoch: int) -> None:
            tracked.log(metrics, epoch)
            work.prune()

        curve = fit(
            backbone, groups, feed, objective, pretrain, model.image_size, compute, work.folder, end_epoch, "pretrain"
        )
        if is_first():
            _without_projector(backbone, objective, config, pretrain)
            write_json(REPORTS / "metrics.json", {"epochs": curve, **work.recorded})
            save_classifier(backbone, config, BACKBONE)
            tracked.set_tags({"model.sha256": sha256(BACKBONE / "model.safetensors")})
            tracked.log_artifacts(REPORTS)
    wait_for_first()
    if is_first():
        work.remove()


def _weights_file(pretrain: Pretrain) -> str:
    """The checksum of what `weights` names, where it is a file: DVC does not know of it."""
    named = Path(pretrain.weights or "")
    return sha256(named) if named.is_file() else ""


def _start(pretrain: Pretrain, model: Model, config: dict[str, Any]) -> "Classifier":
    """The network before its first step, known to take the images."""
    from stages.training.loop.loop import sizes
    from stages.training.networks.models import build, check_takes
    from stages.training.networks.published_weights import start_from

    auxiliary = model.auxiliary_heads and pretrain.method == "supervised"
    backbone = build(config, pretrain.seed, auxiliary)
    if pretrain.weights:
        start_from(backbone, model.architecture, pretrain.weights)
    for size, key in sizes(pretrain, model.image_size).items():
        check_takes(backbone, size, key)
    return backbone


def _task(
    pretrain: Pretrain, model: Model, sets: list[Path], config: dict[str, Any], backbone: "Classifier",
    compute: "Compute",
) -> "tuple[Feed, Objective]":  # fmt: skip
    """What is learned from, and what is minimised."""
    from stages.training.loop.objectives import Looking, Supervised, evaluated_at_once
    from stages.training.loop.train_batches import train_batches
    from stages.training.methods.self_supervision import SelfSupervision

    every, val = read_samples(sets, "train"), read_samples(sets, "val").labelled()
    looking = Looking(val, model.image_size, config["resize"], evaluated_at_once(pretrain))
    if pretrain.method == "supervised":
        train = every.labelled()
        logger.info("pretrain: %s", _counted(train, len(every) - len(train), val))
        return train_batches(train, pretrain, compute), Supervised(backbone, pretrain, looking, compute)
    logger.info(
        "pretrain: %s without labels, %d images, %d labelled ones for val", pretrain.method, len(every), len(val)
    )
    objective = SelfSupervision(backbone, pretrain, every.labelled(), looking, compute)
    return train_batches(every, pretrain, compute, pretrain.self_supervised), objective


def _counted(train: Samples, unlabelled: int, val: Samples) -> str:
    return f"{len(train)} images, {unlabelled} unlabelled ones left out, {len(val)} for val"


def _without_projector(
    backbone: "Classifier", objective: "Objective", config: dict[str, Any], pretrain: Pretrain
) -> None:
    from stages.training.methods.self_supervision import SelfSupervision
    from stages.training.networks.models import fresh_head

    if isinstance(objective, SelfSupervision):
        fresh_head(backbone, objective.width, max(len(config["classes"]), 1), objective.bias, pretrain.seed)


def _config(pretrain: Pretrain, model: Model, sets: list[Path]) -> dict[str, Any]:
    indexes = [read_index(each) for each in sets]
    return {
        "architecture": model.architecture,
        "stem": model.stem,
        "classes": json.loads(Path("data/classes/pretrain.json").read_text(encoding="utf-8")),
        "image_size": model.image_size,
        "resize": max(index["resize"] for index in indexes),
        **(_expected(pretrain, model) or pooled_statistics(indexes) or IMAGENET),
    }


def _expected(pretrain: Pretrain, model: Model) -> dict[str, list[float]] | None:
    """The normalisation that published weights were trained with."""
    if not pretrain.weights:
        return None
    from stages.training.networks.published_weights import normalisation

    return normalisation(model.architecture, pretrain.weights)


if __name__ == "__main__":
    run(main)
