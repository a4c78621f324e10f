"""finetune: the backbone and the shards of the target -> models/finetuned/, and models/scratch/ to compare with."""

import argparse
import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.data.shards.loading.samples.index import read_samples
from stages.data.shards.loading.samples.shard_sets import check_resize, read_index, shard_sets
from stages.params.finetune import Finetune
from stages.params.training.model import Model
from stages.params.training.training import Training
from stages.runtime.command import StageError, run
from stages.runtime.files import replaced_directory, sha256, write_json, write_text
from stages.runtime.fingerprint import fingerprint
from stages.runtime.params_file import load_section
from stages.training.loop.checkpoints.work import TrainingWork, training_work

if TYPE_CHECKING:
    from stages.registry.runs import TrainingRun
    from stages.training.finetuning.strategies import Groups
    from stages.training.loop.objectives import Metrics
    from stages.training.networks.devices import Compute
    from stages.training.networks.models import Classifier

BACKBONE = Path("models/backbone")
FINETUNED = Path("models/finetuned")
SCRATCH = Path("models/scratch")
REPORTS = Path("reports/finetune")
logger = logging.getLogger(__name__)


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
    if not list(shard_sets("finetune")):
        raise StageError("no batch has the role finetune; there is nothing to fine-tune on")

    from stages.training.loop.processes import run_together

    arguments = ["--trial", str(trial)] if trial else []
    main = partial(_trial, trial) if trial else _both
    run_together("stages.finetune", arguments, training, partial(main, finetune, model, training))


def _both(finetune: Finetune, model: Model, training: Training) -> None:
    """The stage: from the backbone, and from scratch."""
    from stages.registry.runs import training_run
    from stages.training.loop.processes import is_first, wait_for_first
    from stages.training.networks.devices import set_up

    compute = set_up(training)
    config = _config(model)
    work = training_work("finetune", compute.kind, training)
    with training_run("finetune", _params(finetune, model, training), work.tags, resumed=work.resumed) as tracked:
        task = _Task(finetune, model, config, compute, tracked, work.prune)
        curves = {"finetuned": task.trained("finetuned", work.folder, FINETUNED)}
        if finetune.scratch:
            curves["scratch"] = task.trained("scratch", work.folder, SCRATCH)
        if is_first():
            if not finetune.scratch:
                with replaced_directory(SCRATCH):
                    pass  # DVC wants its output to be there
            write_json(REPORTS / "metrics.json", _report(curves, work))
            tracked.set_tags({"model.sha256": sha256(FINETUNED / "model.safetensors")})
            tracked.log_artifacts(REPORTS)
    wait_for_first()
    if is_first():
        work.remove()


def _trial(folder: Path, finetune: Finetune, model: Model, training: Training) -> None:
    """One trial of a search: from the backbone alone, checkpoint and all in `folder`, which is kept."""
    from stages.registry.runs import training_run
    from stages.training.loop.processes import is_first, wait_for_first
    from stages.training.networks.devices import set_up

    compute = set_up(training)
    if is_first():
        _drop_other_work(folder, fingerprint("finetune", compute.kind))
    wait_for_first()
    # By its folder an unfinished run is found again.
    tags = {"trial": folder.name, "machine": compute.kind, "fingerprint": str(folder.absolute())}
    resumed = (folder / "finetuned").is_dir()
    with training_run("tune", _params(finetune, model, training), tags, resumed=resumed) as tracked:
        task = _Task(finetune, model, _config(model), compute, tracked)
        curve = task.trained("finetuned", folder, folder / "model")
    if is_first():
        write_json(folder / "metrics.json", {"epochs": curve})


def _drop_other_work(folder: Path, stamp: str) -> None:
    """Removes from a trial's folder what was trained with other parameters, data, code or machine."""
    path = folder / "fingerprint"
    if not path.is_file() or path.read_text(encoding="utf-8") != stamp:
        shutil.rmtree(folder / "finetuned", ignore_errors=True)
        write_text(path, stamp)


class _Task:
    """Training for the target's classes, from either start."""

    def __init__(
        self, finetune: Finetune, model: Model, config: dict[str, Any], compute: "Compute", tracked: "TrainingRun",
        on_epoch: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.finetune, self.model, self.config, self.compute, self.tracked = finetune, model, config, compute, tracked
        self.on_epoch = on_epoch
        sets = list(shard_sets("finetune"))
        check_resize(sets, model.image_size)
        self.train, self.val = read_samples(sets, "train"), read_samples(sets, "val")
        logger.info("finetune: %d images, %d for val, strategy %s", len(self.train), len(self.val), finetune.strategy)

    def trained(self, name: str, work: Path, out: Path) -> "list[Metrics]":
        """Trains the model called `name`, writes it to `out`, and returns its curve.

        Args:
            work: holds the folder of its checkpoint, which has its name.
        """
        from stages.training.finetuning.strategies import merge
        from stages.training.loop.loop import fit
        from stages.training.loop.objectives import Looking, Supervised, evaluated_at_once
        from stages.training.loop.processes import is_first
        from stages.training.loop.train_batches import train_batches
        from stages.training.networks.layer_groups import trainable
        from stages.training.networks.models import save_classifier

        prefix = "" if name == "finetuned" else f"{name}/"

        def log(metrics: "Metrics", epoch: int) -> None:
            self.tracked.log({prefix + key: value for key, value in metrics.items()}, epoch)

        def end_epoch(metrics: "Metrics", epoch: int) -> None:
            log(metrics, epoch)
            self.on_epoch()

        start, groups = self._start(name)
        count, share = trainable(start)
        log({"trainable_parameters": count, "trainable_share": share}, 0)
        looking = Looking(self.val, self.model.image_size, self.config["resize"], evaluated_at_once(self.finetune))
        objective = Supervised(start, self.finetune, looking, self.compute)
        feed = train_batches(self.train, self.finetune, self.compute)
        curve = fit(
            start,
            groups,
            feed,
            objective,
            self.finetune,
            self.model.image_size,
            self.compute,
            work / name,
            end_epoch,
            name,
        )
        merge(start)
        if is_first():
            save_classifier(start, self.config, out)
        return curve

    def _start(self, name: str) -> "tuple[Classifier, Groups]":
        """The network before its first step, and what of it is trained."""
        from stages.training.finetuning.strategies import STRATEGIES
        from stages.training.loop.loop import sizes
        from stages.training.networks.layer_groups import every_weight
        from stages.training.networks.models import build, check_takes, copy_backbone, load_classifier
        from stages.training.networks.regularisation import regularise

        start = build(self.config, self.finetune.seed, self.model.auxiliary_heads)
        for size, key in sizes(self.finetune, self.model.image_size).items():
            check_takes(start, size, key)
        if name == "scratch":
            groups = every_weight(start, self.finetune.lr)
        else:
            copy_backbone(load_classifier(BACKBONE)[0], start)
            groups = STRATEGIES[self.finetune.strategy](start, self.finetune)
        regularise(start, self.finetune.dropout, self.finetune.stochastic_depth)
        return start, groups


def _params(finetune: Finetune, model: Model, training: Training) -> dict[str, Any]:
    return {"finetune": finetune.model_dump(), "model": model.model_dump(), "training": training.model_dump()}


def _report(curves: "dict[str, list[Metrics]]", work: TrainingWork) -> dict[str, Any]:
    return {**{name: {"epochs": curve} for name, curve in curves.items()}, **work.recorded}


def _config(model: Model) -> dict[str, Any]:
    """The backbone's normalisation, the target's classes."""
    path = BACKBONE / "config.json"
    if not path.is_file():
        raise StageError(f"{BACKBONE} holds no model; `dvc repro pretrain` makes it")
    backbone = json.loads(path.read_text(encoding="utf-8"))
    return {
        "architecture": model.architecture,
        "stem": model.stem,
        "classes": json.loads(Path("data/classes/finetune.json").read_text(encoding="utf-8")),
        "image_size": model.image_size,
        "resize": max(read_index(each)["resize"] for each in shard_sets("finetune")),
        "mean": backbone["mean"],
        "std": backbone["std"],
    }


if __name__ == "__main__":
    run(main)
