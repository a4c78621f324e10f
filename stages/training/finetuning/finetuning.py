"""The body of the stage finetune: the target's model from the backbone, from scratch, or as one trial of a search."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.samples.shard_sets import check_resize, read_index, shard_sets
from stages.params.finetune import Finetune
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import replaced_directory, sha256, write_json, write_text
from stages.runtime.fingerprint import fingerprint
from stages.training.finetuning.strategies import STRATEGIES, merge
from stages.training.loop import start
from stages.training.loop.checkpoints.work import training_work
from stages.training.loop.loop import fit
from stages.training.loop.objectives import Metrics, Supervised
from stages.training.loop.processes import is_first, run_together, wait_for_first
from stages.training.loop.state import Setup
from stages.training.loop.train_batches import train_batches
from stages.training.networks.devices import Compute, set_up
from stages.training.networks.layer_groups import Groups, every_weight, trainable
from stages.training.networks.models import Classifier, build, copy_backbone, load_classifier, save_classifier
from stages.training.networks.regularisation import regularise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What the model from the backbone and the one from scratch have in common."""

    finetune: Finetune
    model: Model
    config: dict[str, Any]
    compute: Compute
    train: Samples
    val: Samples


def finetune_target(
    finetune: Finetune, model: Model, training: Training, record: start.Recorder, trial: Path | None = None
) -> None:
    """Trains from the backbone and from scratch, in `training.world_size` processes.

    Args:
        trial: folder of one trial of a search: trains from the backbone alone, and writes only there.

    Raises:
        StageError: no batch has the role finetune, or what the parameters ask for is not possible.
    """
    if not shard_sets("finetune"):
        raise StageError("no batch has the role finetune; there is nothing to fine-tune on")
    arguments = ["--trial", str(trial)] if trial else []
    train = partial(_train_trial, trial) if trial else _train_both
    run_together("stages.finetune", arguments, training, partial(train, finetune, model, training, record))


def _train_both(finetune: Finetune, model: Model, training: Training, record: start.Recorder) -> None:
    """The stage: from the backbone, and from scratch."""
    compute = set_up(training)
    config = _config(model)
    work = training_work("finetune", compute.kind, training)
    with start.recorded(record, "finetune", _params(finetune, model, training), work) as run:
        target = _target(finetune, model, config, compute)
        curves = {"finetuned": _train(target, "finetuned", work.folder, layout.FINETUNED, run, work.prune)}
        if finetune.scratch:
            curves["scratch"] = _train(target, "scratch", work.folder, layout.SCRATCH, run, work.prune)
        if is_first():
            if not finetune.scratch:
                with replaced_directory(layout.SCRATCH):
                    pass  # DVC wants its output to be there
            report = {name: {"epochs": curve} for name, curve in curves.items()}
            write_json(layout.FINETUNE_REPORTS / "metrics.json", {**report, **work.recorded})
            run.set_tags({"model.sha256": sha256(layout.FINETUNED / layout.WEIGHTS)})
            run.log_artifacts(layout.FINETUNE_REPORTS)


def _train_trial(folder: Path, finetune: Finetune, model: Model, training: Training, record: start.Recorder) -> None:
    """One trial of a search: from the backbone alone; `folder` keeps the checkpoint too."""
    compute = set_up(training)
    if is_first():
        _drop_other_work(folder, fingerprint("finetune", compute.kind))
    wait_for_first()
    # An unfinished run of this trial is found again by its folder.
    tags = {"trial": folder.name, "machine": compute.kind, "fingerprint": str(folder.absolute())}
    resumed = (folder / "finetuned").is_dir()
    with record("tune", _params(finetune, model, training), tags, resumed) as run:
        target = _target(finetune, model, _config(model), compute)
        curve = _train(target, "finetuned", folder, folder / "model", run)
    if is_first():
        write_json(folder / "metrics.json", {"epochs": curve})


def _drop_other_work(folder: Path, stamp: str) -> None:
    """Removes from a trial's folder what was trained with other parameters, data, code or machine."""
    path = folder / "fingerprint"
    if not path.is_file() or path.read_text(encoding="utf-8") != stamp:
        shutil.rmtree(folder / "finetuned", ignore_errors=True)
        write_text(path, stamp)


def _target(finetune: Finetune, model: Model, config: dict[str, Any], compute: Compute) -> Target:
    sets = shard_sets("finetune")
    check_resize(sets, model.image_size)
    train, val = read_samples(sets, "train"), read_samples(sets, "val")
    logger.info("finetune: %d images, %d for val, strategy %s", len(train), len(val), finetune.strategy)
    return Target(finetune, model, config, compute, train, val)


def _train(
    target: Target, name: str, work: Path, out: Path, run: start.RunLog, on_epoch: Callable[[], None] = lambda: None
) -> list[Metrics]:
    """Trains the model called `name`, writes it to `out`, and returns its curve.

    Args:
        work: holds the folder of its checkpoint, which has its name.
    """
    finetune, compute = target.finetune, target.compute
    prefix = "" if name == "finetuned" else f"{name}/"

    def log(metrics: Metrics, epoch: int) -> None:
        run.log({prefix + key: value for key, value in metrics.items()}, epoch)

    def end_epoch(metrics: Metrics, epoch: int) -> None:
        log(metrics, epoch)
        on_epoch()

    network, groups = _start(target, name)
    count, share = trainable(network)
    log({"trainable_parameters": count, "trainable_share": share}, 0)
    objective = Supervised(network, finetune, start.validation_view(target.val, target.config, finetune), compute)
    feed = train_batches(target.train, finetune, compute)
    setup = Setup(name, network, groups, feed, objective, finetune, target.model.image_size, compute)
    curve = fit(setup, work / name, end_epoch)
    merge(network)
    if is_first():
        save_classifier(network, target.config, out)
    return curve


def _start(target: Target, name: str) -> tuple[Classifier, Groups]:
    """The network before its first step, and the parameters to train."""
    finetune, model = target.finetune, target.model
    network = build(target.config, finetune.seed, model.auxiliary_heads)
    start.check_sizes(network, finetune, model.image_size)
    if name == "scratch":
        groups = every_weight(network, finetune.lr)
    else:
        copy_backbone(load_classifier(layout.BACKBONE)[0], network)
        groups = STRATEGIES[finetune.strategy](network, finetune)
    regularise(network, finetune.dropout, finetune.stochastic_depth)
    return network, groups


def _params(finetune: Finetune, model: Model, training: Training) -> dict[str, Any]:
    return {"finetune": finetune.model_dump(), "model": model.model_dump(), "training": training.model_dump()}


def _config(model: Model) -> dict[str, Any]:
    """The backbone's normalisation, the target's classes."""
    path = layout.BACKBONE / layout.CONFIG
    if not path.is_file():
        raise StageError(f"{layout.BACKBONE} holds no model; `dvc repro pretrain` makes it")
    backbone = json.loads(path.read_text(encoding="utf-8"))
    resize = max(read_index(shard_set)["resize"] for shard_set in shard_sets("finetune"))
    return start.network_config(model, start.class_names("finetune"), resize, backbone)
