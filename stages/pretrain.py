"""pretrain: shards of the pretrain batches -> models/backbone/, the weights that fine-tuning starts from."""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.command import StageError, run
from stages.data.loading import read_samples
from stages.data.shard_sets import check_resize, pooled_statistics, read_index, shard_sets
from stages.files import sha256, write_json
from stages.fingerprint import fingerprint, prune, work_folder
from stages.params.load import load_section
from stages.params.model import Model
from stages.params.pretrain import Pretrain
from stages.params.training import Training

if TYPE_CHECKING:
    from stages.training.devices import Compute

logger = logging.getLogger(__name__)
BACKBONE = Path("models/backbone")
REPORTS = Path("reports/pretrain")
# torchvision's, for a backbone that saw no image of ours.
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def main() -> None:
    """Trains the backbone, or draws it at random where `method` is none."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    pretrain = load_section("pretrain", Pretrain)
    model = load_section("model", Model)
    training = load_section("training", Training)

    from stages.training.devices import set_up

    compute = set_up(training)
    if pretrain.method == "none":
        _random(pretrain, model)
    else:
        _supervised(pretrain, model, training, compute)


def _random(pretrain: Pretrain, model: Model) -> None:
    from stages.training.models import build, check_takes, save_classifier

    config = {"architecture": model.architecture, "classes": [], "image_size": model.image_size}
    config |= {"resize": model.image_size, **IMAGENET}
    backbone = build(config, pretrain.seed)
    check_takes(backbone, model.image_size)
    save_classifier(backbone, config, BACKBONE)
    write_json(REPORTS / "metrics.json", {"epochs": []})
    logger.info("pretrain: a random backbone (`pretrain.method` is none)")


def _supervised(pretrain: Pretrain, model: Model, training: Training, compute: "Compute") -> None:
    from stages.tracking import training_run
    from stages.training.loop import Recipe, fit
    from stages.training.models import build, check_takes, save_classifier

    sets = list(shard_sets("pretrain"))
    if not sets:
        raise StageError(
            "params.yaml: `pretrain.method` is supervised, but no batch has the role pretrain; set it to none"
        )
    check_resize(sets, model.image_size)
    config = _config(model, sets)
    backbone = build(config, pretrain.seed)
    check_takes(backbone, model.image_size)
    every = read_samples(sets, "train")
    train, val = every.labelled(), read_samples(sets, "val").labelled()
    logger.info(
        "pretrain: %d images, %d unlabelled ones left out, %d for val", len(train), len(every) - len(train), len(val)
    )
    recipe = Recipe.of(pretrain, model.image_size, config["resize"])
    stamp = fingerprint("pretrain", compute.kind)
    work = work_folder("pretrain", stamp)
    prune(work.parent, keep=work)
    params = {"pretrain": pretrain.model_dump(), "model": model.model_dump(), "training": training.model_dump()}
    tags = {"fingerprint": stamp, "machine": compute.kind}
    with training_run("pretrain", params, tags, resumed=work.exists()) as tracked:
        groups = [(list(backbone.parameters()), pretrain.lr)]
        curve = fit(backbone, groups, train, val, recipe, compute, work, tracked.log, "pretrain")
        write_json(REPORTS / "metrics.json", {"epochs": curve})
        save_classifier(backbone, config, BACKBONE)
        tracked.set_tags({"model.sha256": sha256(BACKBONE / "model.safetensors")})
        tracked.log_artifacts(REPORTS)
    shutil.rmtree(work)


def _config(model: Model, sets: list[Path]) -> dict[str, Any]:
    indexes = [read_index(each) for each in sets]
    return {
        "architecture": model.architecture,
        "classes": json.loads(Path("data/classes/pretrain.json").read_text(encoding="utf-8")),
        "image_size": model.image_size,
        "resize": max(index["resize"] for index in indexes),
        **(pooled_statistics(indexes) or IMAGENET),
    }


if __name__ == "__main__":
    run(main)
