"""What each fine-tuning strategy gives from few labels and from all, and what pretraining is worth beside it.

`--params` is a preset with one pretrain and one finetune batch; more presets (`--backbone NAME=PRESET`) bring other
backbones by their section `pretrain`, and `scratch` is random weights, all of them trained. Of the target's training
images 10, 50 or all of each class are labelled; its test images are always all of them, and nothing was tuned on them.
Every training is `stages.finetune --trial`, the figures of cost are those of its run in MLflow. Prints a table in
Markdown: top-1 on test with its 95 % interval (Wilson), for several seeds their mean and range.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench.prepared import Trials
from bench.rounds import machine
from stages.runtime.params_file import read_params

STRATEGIES: dict[str, dict[str, Any]] = {
    "head": {"lr": 0.1},
    "last_block": {"lr": 0.05, "backbone_lr": 0.02},
    "full": {"lr": 0.05, "backbone_lr": 0.02, "layer_decay": 0.8},
    "bias": {"lr": 0.05, "backbone_lr": 0.05},
    "lora": {"lr": 0.05, "backbone_lr": 0.05},
}
EPOCHS = {10: 40, 50: 20}
"""By labels a class; with all of them, those of the preset."""
SMALL_BATCH = 32
"""With few labels, so that an epoch has several steps."""
IMAGES = {".jpeg", ".jpg", ".png"}


class Trained(NamedTuple):
    """One training."""

    hits: int
    images: int
    parameters: int
    share: float
    seconds: float
    memory_mb: float


def main() -> int:
    """Trains everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, required=True, metavar="PRESET")
    parser.add_argument("--incoming", type=Path, required=True, metavar="DIR", help="holds the preset's two sources")
    parser.add_argument(
        "--backbone", action="append", default=[], metavar="NAME=PRESET", help="another section pretrain"
    )
    parser.add_argument("--labels", nargs="+", default=["10", "50", "all"], help="a class")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--scratch", action="store_true", help="random weights too")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, metavar="DIR", help="a new folder that is kept; default: a temporary one")
    options = parser.parse_args()
    if {*options.labels} - {"all"} - {str(count) for count in EPOCHS}:
        parser.error(f"--labels: {', '.join(map(str, EPOCHS))} or all")
    params = read_params(options.params)
    backbones = {"pretrained": params["pretrain"]}
    for each in options.backbone:
        name, _, preset = each.partition("=")
        backbones[name] = read_params(Path(preset))["pretrain"]
    here = machine()
    print(f"{here['cpu']}, {here['cores']} cores\n")
    print("| labels a class | start | trains | parameters | seconds an epoch | memory, MB | top-1 on test |")
    print("|---:|---|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as temporary:
        study = _Study(params, options.incoming, options.work or Path(temporary) / "work")
        for labels in options.labels:
            for start, strategy in _rows(backbones, options):
                found = [
                    study.trained(labels, backbones.get(start, {"method": "none", "seed": seed}), strategy, seed)
                    for seed in range(1, options.seeds + 1)
                ]
                print(f"| {labels} | {start} | {strategy} | {_cells(found)} |", flush=True)
    return 0


def _rows(backbones: dict[str, Any], options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(start, strategy): every strategy from the first backbone, all weights from the others."""
    first, *others = backbones
    yield from ((first, strategy) for strategy in options.strategies)
    yield from ((name, "full") for name in [*others, *(["scratch"] if options.scratch else [])])


def _cells(found: list[Trained]) -> str:
    from stages.evaluation.statistics.intervals import wilson

    one = found[0]
    hits, images = sum(each.hits for each in found), sum(each.images for each in found)
    low, high = wilson(round(hits / len(found)), images // len(found), 0.95)  # of the images of one test set
    each = [each.hits / each.images for each in found]
    spread = f"; {len(found)} seeds: {min(each):.1%} to {max(each):.1%}" if len(found) > 1 else ""
    return (
        f"{one.parameters:,} ({one.share:.1%}) | {mean(each.seconds for each in found):.1f} | {one.memory_mb:,.0f} | "
        f"{hits / images:.1%} ({float(low):.1%} to {float(high):.1%}{spread})"
    )


class _Study:
    """Trainings that differ by labels, backbone and strategy."""

    def __init__(self, params: dict[str, Any], incoming: Path, work: Path) -> None:
        self.params, self.trials = params, Trials(params, incoming, work)
        (self.target,) = (name for name, batch in params["batches"].items() if batch["role"] == "finetune")
        self.folder: str = params["batches"][self.target]["source"]

    def trained(self, labels: str, pretrain: dict[str, Any], strategy: str, seed: int) -> Trained:
        """Trains, and looks at test."""
        params = json.loads(json.dumps(self.params))
        params["batches"][self.target]["source"] = self._source(labels)
        params["validate"] |= {"min_images_per_class": 5}
        params["split"] |= {"val_fraction": 0.0}  # every label trains
        params["pretrain"] = pretrain
        own = STRATEGIES[strategy] if pretrain["method"] != "none" else {"lr": 0.05, "backbone_lr": 0.05}
        few = {} if labels == "all" else {"epochs": EPOCHS[int(labels)], "batch_size": SMALL_BATCH}
        params["finetune"] |= own | few | {"strategy": strategy, "patience": None, "seed": seed}
        return self._measured(self.trials.trained(params))

    def _source(self, labels: str) -> str:
        """A folder with the first images of each class by name to train on, and all others but those of train."""
        if labels == "all":
            return self.folder
        incoming = self.trials.incoming
        few = incoming / f"{self.folder}-{labels}"
        if not few.is_dir():
            for split in sorted((incoming / self.folder).iterdir()):
                for category in sorted(split.iterdir()) if split.is_dir() else ():
                    images = sorted(path for path in category.iterdir() if path.suffix.lower() in IMAGES)
                    (few / split.name / category.name).mkdir(parents=True)
                    for path in images[: int(labels) if split.name == "train" else None]:
                        shutil.copyfile(path, few / split.name / category.name / path.name)
        return few.name

    def _measured(self, trained: Path) -> Trained:
        import mlflow

        hits, images = self.trials.hits(trained, self.params)
        mlflow.set_tracking_uri(f"sqlite:///{self.trials.workspace.root / 'mlflow.db'}")
        (run,) = mlflow.search_runs(experiment_names=["synset/tune"], max_results=1, output_format="list")
        facts, client = run.data.metrics, mlflow.MlflowClient()
        seconds = [point.value for point in client.get_metric_history(run.info.run_id, "seconds")]
        return Trained(
            hits=hits,
            images=images,
            parameters=int(facts["trainable_parameters"]),
            share=facts["trainable_share"],
            seconds=mean(seconds),
            memory_mb=facts["peak_memory_mb"],
        )


if __name__ == "__main__":
    sys.exit(main())
