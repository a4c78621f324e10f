"""Training: resumes exactly, stops early, freezes what it should, and says clearly what is wrong."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from stages.command import StageError
from stages.data.ingesting import write_tar
from stages.data.loading import Samples, read_samples
from stages.data.scanning import scan_tar
from stages.data.sharding import write_shard_set
from stages.data.sources import Group, SourceFile
from stages.fingerprint import fingerprint
from stages.params.finetune import Finetune
from stages.params.shard import Shard
from stages.params.training import Training
from stages.training import loop
from stages.training.devices import Compute, set_up
from stages.training.loop import Recipe, fit
from stages.training.models import Classifier, build, check_takes, copy_backbone, load_classifier, save_classifier
from stages.training.optimisation import one_cycle, sgd
from stages.training.strategies import STRATEGIES

CONFIG: dict[str, Any] = {
    "architecture": "resnet18", "classes": ["dark", "light"], "image_size": 32, "resize": 32,
    "mean": [0.5] * 3, "std": [0.25] * 3,
}  # fmt: skip
RECIPE = Recipe(
    epochs=3, batch_size=8, weight_decay=1e-4, label_smoothing=0.1, warmup=0.2, min_crop_area=0.5, seed=1,
    image_size=32, resize=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Samples, Samples]:
    """32 training and 8 val images of two classes, one dark and one light."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    rows = []
    for label, name in enumerate(CONFIG["classes"]):
        files = []
        for number in range(20):
            file = io.BytesIO()
            pixels = rng.integers(130 * label, 130 * label + 120, (36, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "JPEG")
            files.append(SourceFile(f"{number}.jpg", partial(io.BytesIO, file.getvalue())))
        write_tar(Group("all", name, files), folder / "raw")
        rows += [row | {"label": label} for row in scan_tar(folder / f"raw/all/{name}.tar", folder / "raw", "mine")]
    accepted = pd.DataFrame(rows)
    accepted["split"] = np.where(np.arange(len(accepted)) % 5 == 0, "val", "train")
    write_shard_set(accepted, folder / "raw", folder / "mine", Shard(resize=36), "finetune", "mine")
    return read_samples([folder / "mine"], "train"), read_samples([folder / "mine"], "val")


@pytest.fixture(scope="module")
def compute() -> Compute:
    return set_up(Training(device="cpu", threads=1))


@pytest.fixture(autouse=True)
def _a_checkpoint_after_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0)


def train(
    data: tuple[Samples, Samples],
    compute: Compute,
    work: Path,
    recipe: Recipe = RECIPE,
    stop_after: int = 0,
    lr: float = 0.02,
) -> tuple[Classifier, list[dict[str, float]]]:
    """Trains a new model; with `stop_after`, is interrupted after that epoch."""

    def on_epoch(_: dict[str, float], epoch: int) -> None:
        if epoch == stop_after:
            raise KeyboardInterrupt

    model = build(CONFIG, seed=1)
    curve = fit(model, [(list(model.parameters()), lr)], *data, recipe, compute, work, on_epoch, "test")
    return model, curve


def same_weights(first: Classifier, second: Classifier) -> bool:
    pairs = zip(first.net.state_dict().values(), second.net.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_killed_and_resumed_ends_in_the_same_weights_and_curve(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    undisturbed, curve = train(data, compute, tmp_path / "a")
    for epoch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train(data, compute, tmp_path / "b", stop_after=epoch)
    resumed, curve_of_resumed = train(data, compute, tmp_path / "b")
    assert same_weights(undisturbed, resumed)
    assert curve == curve_of_resumed
    assert [metrics["epoch"] for metrics in curve] == [1, 2, 3]


def test_it_learns(data: tuple[Samples, Samples], compute: Compute, tmp_path: Path) -> None:
    # A low rate: higher ones spike on four batches an epoch, after which another processor's rounding decides.
    _, curve = train(data, compute, tmp_path, replace(RECIPE, epochs=8), lr=0.003)
    assert curve[-1]["train_loss"] < 0.6 * curve[0]["train_loss"]
    assert curve[-1]["val_top1"] > 0.8
    assert curve[-1]["lr"] < 0.003


def test_early_stopping_keeps_the_best_epoch(data: tuple[Samples, Samples], compute: Compute, tmp_path: Path) -> None:
    recipe = Recipe(**(vars(RECIPE) | {"epochs": 12, "patience": 2}))
    _, curve = train(data, compute, tmp_path, recipe, lr=0.3)
    losses = [metrics["val_loss"] for metrics in curve]
    best = losses.index(min(losses))
    assert len(curve) == min(best + 1 + 2, 12)
    model, again = train(data, compute, tmp_path, recipe, lr=0.3)  # from the finished checkpoint
    assert again == curve
    assert loop.validation_metrics(model, data[1], recipe, compute)["val_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_and_says_so(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=r"train_loss is nan in epoch 1.*lower `lr`"):
        train(data, compute, tmp_path, lr=1e20)


def test_head_trains_the_head_alone_and_full_everything(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    for strategy, may_change in (("head", {"fc.weight", "fc.bias"}), ("full", None)):
        model = build(CONFIG, seed=1)
        before = {name: value.clone() for name, value in model.net.state_dict().items()}
        groups = STRATEGIES[strategy](model, Finetune(lr=0.1, backbone_lr=0.01))
        fit(model, groups, *data, RECIPE, compute, tmp_path / strategy, lambda *_: None, "test")
        changed = {name for name, value in model.net.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == (may_change or set(before))


def test_groups_cover_each_weight_once_and_decay_no_norm() -> None:
    model = build(CONFIG, seed=1)
    optimiser = sgd(STRATEGIES["full"](model, Finetune(lr=0.1, backbone_lr=0.01)), weight_decay=0.1)
    seen = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert sorted(map(id, seen)) == sorted(map(id, model.parameters()))
    for group in optimiser.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])
    of_head = {id(parameter) for parameter in model.head.parameters()}
    assert {group["lr"] for group in optimiser.param_groups if id(group["params"][0]) in of_head} == {0.1}


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing() -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = one_cycle(optimiser, steps=100, warmup=0.25)
    rates = []
    for _ in range(100):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert max(rates) == pytest.approx(2.0)
    assert rates.index(max(rates)) == 25
    assert rates == sorted(rates[:25]) + sorted(rates[25:], reverse=True)
    assert rates[-1] < 0.01


def test_a_saved_model_loads_the_same_and_saves_the_same(tmp_path: Path, compute: Compute) -> None:
    model = build(CONFIG, seed=4)
    for name in ("a", "b"):
        save_classifier(model, CONFIG, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    loaded, config = load_classifier(tmp_path / "a")
    assert config == CONFIG
    assert same_weights(model, loaded)
    images = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    assert loaded(images).shape == (3, 2)
    assert loaded.features(images).shape == (3, 512)
    with pytest.raises(StageError, match="holds no model"):
        load_classifier(tmp_path / "c")


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny"])
def test_the_backbone_moves_to_a_model_of_other_classes(architecture: str) -> None:
    source = build(CONFIG | {"architecture": architecture, "classes": list("abcdef")}, seed=1)
    target = build(CONFIG | {"architecture": architecture}, seed=2)
    head_before = target.head.weight.clone()
    copy_backbone(source, target)
    assert torch.equal(target.head.weight, head_before)
    assert target.head.out_features == 2
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(source.eval().features(images), target.eval().features(images))


def test_a_size_that_the_architecture_cannot_take_is_known_before_training() -> None:
    check_takes(build(CONFIG, seed=1), 32)
    with pytest.raises(StageError, match="VisionTransformer takes no image of 64 px"):
        check_takes(build(CONFIG | {"architecture": "vit_b_32"}, seed=1), 64)


def test_the_fingerprint_changes_with_whatever_decides_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/shards/pretrain/mine").mkdir(parents=True)
    index = tmp_path / "data/shards/pretrain/mine/index.json"
    index.write_text(json.dumps({"sha256": "1"}), encoding="utf-8")
    (tmp_path / "code.py").write_text("one", encoding="utf-8")
    (tmp_path / "params.yaml").write_text("pretrain: {lr: 0.1}\nother: 1\n", encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(
        "stages: {pretrain: {cmd: x, params: [pretrain], deps: [code.py, data/shards/pretrain]}}", encoding="utf-8"
    )
    seen = [fingerprint("pretrain", "cpu")]
    (tmp_path / "params.yaml").write_text("pretrain: {lr: 0.1}\nother: 2\n", encoding="utf-8")
    assert fingerprint("pretrain", "cpu") == seen[0]
    for change in (
        lambda: (tmp_path / "params.yaml").write_text("pretrain: {lr: 0.2}\n", encoding="utf-8"),
        lambda: (tmp_path / "code.py").write_text("two", encoding="utf-8"),
        lambda: index.write_text(json.dumps({"sha256": "2"}), encoding="utf-8"),
    ):
        change()
        seen.append(fingerprint("pretrain", "cpu"))
    seen.append(fingerprint("pretrain", "cuda"))
    assert len(set(seen)) == len(seen)
