"""finetune: the backbone and the shards of the target -> models/finetuned/, and models/scratch/ to compare with."""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.command import StageError, run
from stages.data.loading import read_samples
from stages.data.shard_sets import check_resize, read_index, shard_sets
from stages.files import replaced_directory, sha256, write_json
from stages.fingerprint import fingerprint, prune, work_folder
from stages.params.finetune import Finetune
from stages.params.load import load_section
from stages.params.model import Model
from stages.params.training import Training

if TYPE_CHECKING:
    from stages.training.loop import Metrics
    from stages.training.models import Classifier
    from stages.training.strategies import Groups

BACKBONE = Path("models/backbone")
FINETUNED = Path("models/finetuned")
SCRATCH = Path("models/scratch")
REPORTS = Path("reports/finetune")
logger = logging.getLogger(__name__)


def main() -> None:
    """Trains the target model from the backbone, then from random weights with the same recipe."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    finetune = load_section("finetune", Finetune)
    model = load_section("model", Model)
    training = load_section("training", Training)
    sets = list(shard_sets("finetune"))
    if not sets:
        raise StageError("no batch has the role finetune; there is nothing to fine-tune on")
    check_resize(sets, model.image_size)

    from stages.tracking import training_run
    from stages.training.devices import set_up
    from stages.training.loop import Recipe, fit
    from stages.training.models import build, copy_backbone, load_classifier, save_classifier
    from stages.training.strategies import STRATEGIES, scratch

    compute = set_up(training)
    backbone, backbone_config = load_classifier(BACKBONE)
    config = _config(model, sets, backbone_config)
    train, val = read_samples(sets, "train"), read_samples(sets, "val")
    logger.info("finetune: %d images, %d for val, strategy %s", len(train), len(val), finetune.strategy)
    recipe = Recipe.of(finetune, model.image_size, config["resize"])
    stamp = fingerprint("finetune", compute.kind)
    work = work_folder("finetune", stamp)
    prune(work.parent, keep=work)

    params = {"finetune": finetune.model_dump(), "model": model.model_dump(), "training": training.model_dump()}
    tags = {"fingerprint": stamp, "machine": compute.kind}
    with training_run("finetune", params, tags, resumed=work.exists()) as tracked:

        def trained(start: "Classifier", groups: "Groups", name: str, out: Path) -> "list[Metrics]":
            prefix = "" if name == "finetuned" else f"{name}/"

            def log(metrics: "Metrics", epoch: int) -> None:
                tracked.log({prefix + key: value for key, value in metrics.items()}, epoch)

            curve = fit(start, groups, train, val, recipe, compute, work, log, name)
            save_classifier(start, config, out)
            return curve

        start = build(config, finetune.seed)
        copy_backbone(backbone, start)
        curves = {"finetuned": trained(start, STRATEGIES[finetune.strategy](start, finetune), "finetuned", FINETUNED)}
        if finetune.scratch:
            start = build(config, finetune.seed)
            curves["scratch"] = trained(start, scratch(start, finetune), "scratch", SCRATCH)
        else:
            with replaced_directory(SCRATCH):
                pass  # DVC wants its output to be there
        write_json(REPORTS / "metrics.json", {name: {"epochs": curve} for name, curve in curves.items()})
        tracked.set_tags({"model.sha256": sha256(FINETUNED / "model.safetensors")})
        tracked.log_artifacts(REPORTS)
    shutil.rmtree(work)


def _config(model: Model, sets: list[Path], backbone: dict[str, Any]) -> dict[str, Any]:
    """The backbone's normalisation, the target's classes."""
    return {
        "architecture": model.architecture,
        "classes": json.loads(Path("data/classes/finetune.json").read_text(encoding="utf-8")),
        "image_size": model.image_size,
        "resize": max(read_index(each)["resize"] for each in sets),
        "mean": backbone["mean"],
        "std": backbone["std"],
    }


if __name__ == "__main__":
    run(main)
