"""A small model that really answers, with all that the stages before `register` leave behind: 3 classes of bells."""

import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from stages.data.raw.facts import QUARANTINE
from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.writing import write_shard_set
from stages.params.shard import Shard
from stages.registry import model_process, registering
from stages.registry.served_model import read_pixels
from stages.runtime.command import StageError
from stages.runtime.files import write_json
from stages.runtime.tables import write_table
from stages.training.networks.models import Classifier, build, save_classifier
from tests.conftest import Once

ROOT = Path(__file__).parents[1]

CLASSES = ["bell", "cup|mug", "tent"]
IMAGES = 48
PARAMS: dict[str, Any] = {
    "batches": {"target": {"role": "finetune", "source": "sample:target"}},
    "model": {"architecture": "shufflenet_v2_x0_5", "image_size": 64},
    "finetune": {"strategy": "head"},
    "evaluate": {},
    "gate": {"min_top1": 0.2, "min_worst_class": 0.0, "max_ece": 1.0, "max_latency_ms": 1e6},
    "register": {"name": "bells"},
}


@contextmanager
def tree_of_bells(folder: Path, once: Once, new_database: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A tree of its own as working directory; with an empty MLflow database, where that is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr("sys.argv", ["register"])
        shutil.copytree(once("bells", make_tree), folder, dirs_exist_ok=True)
        if new_database:
            new_database(folder)
        yield folder


@contextmanager
def asked_here() -> Iterator[None]:
    """Models are asked in this process: to start one takes longer than all the rest, and each model has one code."""

    def request(_: "subprocess.Popen[str]", source: str, folder: Path, timed: int = 0) -> None:
        try:
            model_process._predict(source, folder, timed)
        except Exception as error:
            raise StageError(f"the model {source} does not load and answer:\n  {error}") from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_process, "_request", request)
        patch.setattr(model_process, "fresh_process", no_process)
        patch.setattr(registering, "TIMED", 2)
        yield


@contextmanager
def no_process(threads: int = 1) -> Iterator[None]:
    """In place of a fresh process."""
    yield


def set_name(tree: Path, name: str, **sections: Any) -> None:
    """Another `register.name`, and other sections of params.yaml."""
    params = PARAMS | {"register": {"name": name}} | sections
    (tree / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def make_tree(folder: Path) -> None:
    """What the stages before register leave behind, for 3 classes and 48 test images."""
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS), encoding="utf-8")
    write_shards(folder, "target", "test", IMAGES)
    write_json(folder / "data/classes/finetune.json", CLASSES)
    bad = {field.name: "" if field.type == "string" else 0 for field in QUARANTINE} | {"decodes": False}
    write_table(pd.DataFrame([bad | {"reason": "truncated"}]), QUARANTINE, folder / "data/quarantine.parquet")
    write_model(folder)


def write_shards(folder: Path, batch: str, split: str, images: int, resize: int = 72) -> None:
    """The shard set of a batch that has one split only."""
    raw, out = folder / "raw" / batch, folder / "data/shards/finetune" / batch
    raw.mkdir(parents=True)
    out.mkdir(parents=True)
    rows = []
    with tarfile.open(raw / "all.tar", "w") as tar:
        for number in range(images):
            data = picture(number + (split == "fresh") * 1000, 90 + number, 80)
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            offset = tar.offset - -(-len(data) // 512) * 512
            digest = hashlib.sha256(data).hexdigest()
            rows.append((f"{batch}/{split}/x/{number}.jpg", "all.tar", offset, len(data), digest, number % 3, split))
    columns = ["key", "tar", "offset", "bytes", "sha256", "label", "split"]
    write_shard_set(pd.DataFrame(rows, columns=columns), raw, out, Shard(resize=resize), "finetune", batch)


def picture(seed: int, width: int, height: int) -> bytes:
    """A JPEG of smooth random colours."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_model(folder: Path, noise: float = 0.0) -> None:
    """A model whose answers depend on the image, with its predictions and metrics for all shard sets there are.

    Labels are those of the model without noise, every fifth one wrong; `noise` in the head makes a similar model.
    """
    config: dict[str, Any] = {
        "architecture": "shufflenet_v2_x0_5", "classes": CLASSES, "image_size": 64, "resize": 72,
        "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.2],
    }  # fmt: skip
    sets = sorted(path.parent for path in (folder / "data/shards/finetune").glob("*/index.json"))
    splits = {split: read_samples(sets, split) for split in ("test", "fresh")}
    images = {split: _pixels(samples) for split, samples in splits.items() if len(samples)}
    model = _sensitive(build(config, seed=1), images["test"])
    tables = []
    with torch.inference_mode():
        labels = {split: model(each).argmax(1).numpy() for split, each in images.items()}
        model.head.weight.add_(noise * torch.randn(model.head.weight.shape, generator=torch.manual_seed(2)))
        for split, each in images.items():
            labels[split][::5] = (labels[split][::5] + 1) % len(CLASSES)
            keys = splits[split].key
            table = {"key": keys, "batch": keys[0].split("/")[0], "split": split, "label": labels[split]}
            tables.append(pd.DataFrame(table | {"logits": list(model(each).numpy())}))
    save_classifier(model, config, folder / "models/finetuned")
    _write_reports(folder, pd.concat(tables, ignore_index=True))


def _pixels(samples: Samples) -> torch.Tensor:
    pixels = [torch.from_numpy(read_pixels(samples.jpeg(i), 72, 64).copy()) for i in range(len(samples))]
    return torch.stack(pixels).permute(0, 3, 1, 2)


def _sensitive(model: Classifier, images: torch.Tensor) -> Classifier:
    """Random weights answer the same to everything: batch statistics and a large head make them tell images apart."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.inference_mode():
        model.train()(images)
        model.eval()
        features = model.features(images)
        model.head.weight.mul_(2 / (features @ model.head.weight.T).std())
        model.head.bias.copy_(-(features.mean(0) @ model.head.weight.T))
    return model


def _write_reports(folder: Path, table: pd.DataFrame) -> None:
    (folder / "reports").mkdir(exist_ok=True)
    table.to_parquet(folder / "reports/predictions.parquet")
    test = table[table["split"] == "test"]
    top1 = float((np.stack(test["logits"].to_list()).argmax(1) == test["label"]).mean())
    figures = {"top1": top1, "top1_low": top1 - 0.05, "top1_high": top1 + 0.05, "macro_f1": 0.7, "ece": 0.1}
    figures |= {"count": len(test), "worst_class_recall": 0.5}
    data = {"accepted": len(table), "quarantined": 1}
    parts = {"test": figures, "before": {"top1": 0.4}, "scratch": {"top1": None}, "data": data}
    write_json(folder / "reports/metrics.json", parts)
    write_json(folder / "reports/finetune/metrics.json", {"finetuned": {"epochs": [{"epoch": 0, "train_loss": 1.0}]}})
    write_json(folder / "reports/validation.json", {"batches": {"target": {"drift": []}}})
