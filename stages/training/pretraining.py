"""The body of the stage pretrain: trains the backbone, or writes it untrained."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from stages.data.shards.loading.samples.index import read_samples
from stages.data.shards.loading.samples.shard_sets import check_resize, pooled_statistics, read_index, shard_sets
from stages.params.pretrain import Pretrain
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import sha256, write_json
from stages.runtime.fingerprint import prune
from stages.training.loop import start
from stages.training.loop.checkpoints.work import training_work
from stages.training.loop.loop import fit
from stages.training.loop.objectives import Metrics, Objective, Supervised
from stages.training.loop.processes import is_first, run_together
from stages.training.loop.state import Setup
from stages.training.loop.train_batches import Feed, train_batches
from stages.training.methods.published_weights import normalisation, start_from
from stages.training.methods.self_supervision import SelfSupervision
from stages.training.networks.devices import Compute, set_up
from stages.training.networks.layer_groups import every_weight, trainable
from stages.training.networks.models import Classifier, build, fresh_head, save_classifier
from stages.training.networks.regularisation import regularise

logger = logging.getLogger(__name__)
METRICS = layout.PRETRAIN_REPORTS / "metrics.json"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
"""torchvision's normalisation, for a backbone that has seen none of our images."""


def pretrain_backbone(pretrain: Pretrain, model: Model, training: Training, record: start.Recorder) -> None:
    """Trains the backbone in `training.world_size` processes; writes it untrained where `method` is none.

    Raises:
        StageError: no batch has the role pretrain, or what the parameters ask for is not possible.
    """
    if pretrain.method == "none":
        _write_untrained(pretrain, model)
    else:
        run_together("stages.pretrain", [], training, partial(_train, pretrain, model, training, record))


def _write_untrained(pretrain: Pretrain, model: Model) -> None:
    config = start.network_config(model, [], model.image_size, _published_normalisation(pretrain, model) or IMAGENET)
    save_classifier(_start(pretrain, model, config), config, layout.BACKBONE)
    write_json(METRICS, {"epochs": []})
    prune(layout.work("pretrain"), keep=Path())  # checkpoints of an earlier training
    logger.info("pretrain: %s (`pretrain.method` is none)", pretrain.weights or "a random backbone")


def _train(pretrain: Pretrain, model: Model, training: Training, record: start.Recorder) -> None:
    compute = set_up(training)
    sets = shard_sets("pretrain")
    if not sets:
        raise StageError(
            f"params.yaml: `pretrain.method` is {pretrain.method}, but no batch has the role pretrain; set it to none"
        )
    check_resize(sets, model.image_size)
    config = _config(pretrain, model, sets)
    backbone = _start(pretrain, model, config)
    feed, objective = _task(pretrain, sets, config, backbone, compute)
    regularise(backbone, pretrain.dropout, pretrain.stochastic_depth)  # now that a projector may replace the head
    work = training_work("pretrain", compute.kind, training, source=_weights_file(pretrain))
    params = {"pretrain": pretrain.model_dump(), "model": model.model_dump(), "training": training.model_dump()}
    with start.recorded(record, "pretrain", params, work) as run:
        groups = every_weight(backbone, pretrain.lr)
        count, share = trainable(backbone)
        run.log({"trainable_parameters": count, "trainable_share": share}, 0)

        def end_epoch(metrics: Metrics, epoch: int) -> None:
            run.log(metrics, epoch)
            work.prune()

        setup = Setup("pretrain", backbone, groups, feed, objective, pretrain, model.image_size, compute)
        curve = fit(setup, work.folder, end_epoch)
        if is_first():
            if isinstance(objective, SelfSupervision):  # the projector is not kept
                fresh_head(backbone, objective.width, max(len(config["classes"]), 1), objective.bias, pretrain.seed)
            write_json(METRICS, {"epochs": curve, **work.recorded})
            save_classifier(backbone, config, layout.BACKBONE)
            run.set_tags({"model.sha256": sha256(layout.BACKBONE / layout.WEIGHTS)})
            run.log_artifacts(layout.PRETRAIN_REPORTS)


def _weights_file(pretrain: Pretrain) -> str:
    """The checksum of the file that `weights` names, if it names one: DVC does not know of it."""
    named = Path(pretrain.weights or "")
    return sha256(named) if named.is_file() else ""


def _start(pretrain: Pretrain, model: Model, config: dict[str, Any]) -> Classifier:
    """The network before its first step; it is known to take images of every size in use."""
    auxiliary = model.auxiliary_heads and pretrain.method == "supervised"
    backbone = build(config, pretrain.seed, auxiliary)
    if pretrain.weights:
        start_from(backbone, model.architecture, pretrain.weights)
    start.check_sizes(backbone, pretrain, model.image_size)
    return backbone


def _task(
    pretrain: Pretrain, sets: list[Path], config: dict[str, Any], backbone: Classifier, compute: Compute
) -> tuple[Feed, Objective]:
    """The training images, and the loss to minimise on them."""
    images, val = read_samples(sets, "train"), read_samples(sets, "val").labelled()
    labelled, view = images.labelled(), start.validation_view(val, config, pretrain)
    if pretrain.method == "supervised":
        counts = len(labelled), len(images) - len(labelled), len(val)
        logger.info("pretrain: %d images, %d unlabelled ones left out, %d for val", *counts)
        return train_batches(labelled, pretrain, compute), Supervised(backbone, pretrain, view, compute)
    words = "pretrain: %s without labels, %d images, %d labelled ones for val"
    logger.info(words, pretrain.method, len(images), len(val))
    objective = SelfSupervision(backbone, pretrain, labelled, view, compute)
    own = pretrain.self_supervised
    feed = train_batches(images, pretrain, compute, views=2, jitter=own.jitter, grey=own.grey, blur=own.blur)
    return feed, objective


def _config(pretrain: Pretrain, model: Model, sets: list[Path]) -> dict[str, Any]:
    indexes = [read_index(shard_set) for shard_set in sets]
    statistics = _published_normalisation(pretrain, model) or pooled_statistics(indexes) or IMAGENET
    resize = max(index["resize"] for index in indexes)
    return start.network_config(model, start.class_names("pretrain"), resize, statistics)


def _published_normalisation(pretrain: Pretrain, model: Model) -> dict[str, list[float]] | None:
    """The normalisation that published weights were trained with."""
    return normalisation(model.architecture, pretrain.weights) if pretrain.weights else None
