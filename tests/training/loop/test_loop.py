"""The loop: exact from any step on, early stopping, frozen norms, a loss that is not finite, and what is wrong said."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.data.shards.loading.samples.index import Samples
from stages.params.finetune import Finetune
from stages.params.training.recipe import Adversarial, Recipe
from stages.params.training.training import Training
from stages.runtime.command import StageError
from stages.training.finetuning.strategies import STRATEGIES
from stages.training.loop.checkpoints import saving
from stages.training.loop.checkpoints.file import load_checkpoint
from stages.training.loop.loop import fit
from stages.training.loop.objectives import Metrics, Supervised, ValidationView, supervised_metrics
from stages.training.loop.progressive_resizing import size_in, sizes
from stages.training.loop.state import Setup
from stages.training.loop.train_batches import Feed, train_batches
from stages.training.networks.devices import Compute, set_up
from stages.training.networks.models import Classifier, build
from stages.training.networks.regularisation import regularise
from tests.training.images import CONFIG, dark_and_light

RECIPE = Recipe(epochs=3, batch_size=8, lr=0.02, weight_decay=1e-4, min_crop_area=0.5)
EVERYTHING = Recipe(
    epochs=2, batch_size=8, lr=0.02, mixup=0.2, cutmix=1.0, augment="trivial", rotation=10, erasing=0.5, ema=0.9,
    dropout=0.2, stochastic_depth=0.2, clip_norm=1.0, accumulate=2, start_size=24, schedule="one_cycle",
)  # fmt: skip
RECIPES = {
    "plain": RECIPE,
    "everything": EVERYTHING,
    "adamw": RECIPE.model_copy(update={"epochs": 2, "optimiser": "adamw", "lr": 1e-3, "accumulate": 3}),
    "muon": RECIPE.model_copy(update={"epochs": 2, "optimiser": "muon", "schedule": "steps", "milestones": [1]}),
    "adversarial": RECIPE.model_copy(update={"epochs": 2, "adversarial": Adversarial(val_steps=2)}),
}
SMALL = CONFIG | {"architecture": "shufflenet_v2_x0_5"}
"""Its checkpoints are a thirtieth of the other's, and half precision takes a processor no time."""
FLOAT32 = Training(device="cpu", threads=1, precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Samples, Samples]:
    """32 training and 8 val images of two classes, one dark and one light."""
    return dark_and_light(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def compute() -> Compute:
    return set_up(FLOAT32)


@pytest.fixture
def _a_checkpoint_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(saving.CHECKPOINT_STEPS, "1")


every_step = pytest.mark.usefixtures("_a_checkpoint_after_every_step")


def interrupted(feed: Feed, after: int) -> Feed:
    """A feed that fails after so many batches of this run, as a disk may."""
    left = [after]

    def batches(epoch: int, start: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in feed.batches(epoch, start, size):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield batch

    return replace(feed, batches=batches)


def train(
    data: tuple[Samples, Samples],
    compute: Compute,
    work: Path,
    recipe: Recipe = RECIPE,
    change: Callable[[Feed], Feed] = lambda feed: feed,
    image_size: int = 32,
    config: dict[str, Any] = SMALL,
) -> tuple[Classifier, list[Metrics]]:
    """Trains a new model on the images, fed as `change` makes it."""
    model = network(recipe, config)
    objective = Supervised(model, recipe, ValidationView(data[1], image_size, 36, 8), compute)
    groups = [(list(model.parameters()), recipe.lr)]
    feed = change(train_batches(data[0], recipe, compute))
    setup = Setup("test", model, groups, feed, objective, recipe, image_size, compute)
    return model, fit(setup, work, lambda *_: None)


def network(recipe: Recipe, config: dict[str, Any] = SMALL) -> Classifier:
    """A new one, as the recipe regularises it."""
    model = build(config, seed=1)
    regularise(model, recipe.dropout, recipe.stochastic_depth)
    return model


def same_weights(first: Classifier, second: Classifier) -> bool:
    """To the last bit, running statistics too."""
    pairs = zip(first.net.state_dict().values(), second.net.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@every_step
@pytest.mark.parametrize("name", list(RECIPES))
def test_killed_in_any_epoch_it_ends_in_the_same_weights_and_curve(
    name: str, data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    # One with branches to skip, where the recipe skips them.
    config = SMALL | ({"architecture": "mobilenet_v3_small"} if recipe.stochastic_depth else {})
    undisturbed, curve = train(data, compute, tmp_path / "a", recipe, config=config)
    for after in (1, 2, 3):  # batches; the first of these is in the first epoch, the last in the second
        with pytest.raises(KeyboardInterrupt):
            train(data, compute, tmp_path / "b", recipe, partial(interrupted, after=after), config=config)
    resumed, curve_of_resumed = train(data, compute, tmp_path / "b", recipe, config=config)
    assert same_weights(undisturbed, resumed)
    assert curve == curve_of_resumed
    assert [metrics["epoch"] for metrics in curve] == list(range(1, recipe.epochs + 1))
    lines = (tmp_path / "b/progress.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == curve


@every_step
def test_fp16_with_its_scaler_goes_on_exactly(data: tuple[Samples, Samples], tmp_path: Path) -> None:
    half = set_up(FLOAT32.model_copy(update={"precision": "fp16"}))
    recipe = RECIPE.model_copy(update={"epochs": 1, "batch_size": 16})
    undisturbed, _ = train(data, half, tmp_path / "a", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(data, half, tmp_path / "b", recipe, lambda feed: interrupted(feed, 1))
    state = load_checkpoint(tmp_path / "b/checkpoint.pt")
    assert state and state["scaler"]["scale"] > 1
    resumed, _ = train(data, half, tmp_path / "b", recipe)
    assert same_weights(undisturbed, resumed)


@every_step
def test_a_checkpoint_is_never_half_written(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = train(data, compute, tmp_path / "a")

    def torn(path: Path, content: Any) -> int:
        path.open("wb").write(bytes(content)[:1000])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, compute, tmp_path / "b", change=lambda feed: interrupted(feed, 6))
    before = (tmp_path / "b/checkpoint.pt").read_bytes()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_bytes", torn)
        train(data, compute, tmp_path / "b")
    assert (tmp_path / "b/checkpoint.pt").read_bytes() == before
    resumed, _ = train(data, compute, tmp_path / "b")
    assert same_weights(undisturbed, resumed)


def test_a_damaged_checkpoint_is_named(data: tuple[Samples, Samples], compute: Compute, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(StageError, match=r"checkpoint\.pt is damaged; remove it"):
        train(data, compute, tmp_path)


def test_sigterm_while_the_last_epoch_is_written_down_still_stops(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, curve = train(data, compute, tmp_path / "a")
    save = saving.save_checkpoint

    def disturbed(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if len(state["curve"]) == RECIPE.epochs:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(saving, "save_checkpoint", disturbed)
    with pytest.raises(SystemExit) as stopped:
        train(data, compute, tmp_path / "b")
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed, curve_of_resumed = train(data, compute, tmp_path / "b")
    assert same_weights(undisturbed, resumed) and curve == curve_of_resumed


@pytest.mark.parametrize("when", ["in an epoch", "in validation"])
def test_sigterm_leaves_a_checkpoint_of_that_very_step(
    when: str, data: tuple[Samples, Samples], compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(saving.CHECKPOINT_STEPS, "1000")
    undisturbed, curve = train(data, compute, tmp_path / "a")

    def signalling(feed: Feed) -> Feed:
        def batches(epoch: int, start: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in enumerate(feed.batches(epoch, start, size)):
                yield batch
                if epoch == 2 and number == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        return replace(feed, batches=batches)

    if when == "in validation":
        measure = Supervised.measure
        calls = iter([False, True])

        def disturbed(self: Supervised, model: Classifier) -> Metrics:
            if next(calls, False):
                os.kill(os.getpid(), signal.SIGTERM)
            return measure(self, model)

        monkeypatch.setattr(Supervised, "measure", disturbed)
    with pytest.raises(SystemExit) as stopped:
        train(data, compute, tmp_path / "b", change=signalling if when == "in an epoch" else lambda feed: feed)
    assert stopped.value.code == 128 + signal.SIGTERM
    state = load_checkpoint(tmp_path / "b/checkpoint.pt")
    assert state and (state["epoch"], state["step"]) == (2, 3 if when == "in an epoch" else 4)
    resumed, curve_of_resumed = train(data, compute, tmp_path / "b")
    assert same_weights(undisturbed, resumed) and curve == curve_of_resumed


def test_it_learns(data: tuple[Samples, Samples], compute: Compute, tmp_path: Path) -> None:
    # A low rate: higher ones spike on four batches an epoch, after which another processor's rounding decides.
    recipe = RECIPE.model_copy(update={"epochs": 8, "lr": 0.003})
    _, curve = train(data, compute, tmp_path, recipe, config=CONFIG)
    assert curve[-1]["train_loss"] < 0.6 * curve[0]["train_loss"]
    assert curve[-1]["val_top1"] > 0.8
    assert curve[-1]["lr"] < 0.003


def test_the_first_steps_are_those_of_a_plain_loop(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    """A golden curve, but written out as what it must equal: the textbook's loop."""
    recipe = RECIPE.model_copy(update={"epochs": 1, "warmup": 0.0})
    _, curve = train(data, compute, tmp_path, recipe)
    model = build(SMALL, seed=1).train()
    compute.place(model)
    decayed = [weights for weights in model.parameters() if weights.ndim > 1]
    others = [weights for weights in model.parameters() if weights.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 1e-4}, {"params": others}]
    sgd = torch.optim.SGD(groups, recipe.lr, momentum=0.9, nesterov=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 4)
    total = 0.0
    for images, labels in train_batches(data[0], recipe, compute).batches(1, 0, 32):
        loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        cosine.step()
        total += loss.item() * len(labels)
    assert curve[0]["train_loss"] == pytest.approx(total / 32, rel=1e-5)
    assert supervised_metrics(model.eval(), ValidationView(data[1], 32, 36, 8), compute)["val_loss"] == pytest.approx(
        curve[0]["val_loss"], rel=1e-4
    )


@pytest.mark.parametrize("monitor", ["val_loss", "val_top1", "train_loss"])
def test_early_stopping_keeps_the_best_epoch(
    monitor: str, data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 12, "patience": 2, "monitor": monitor, "lr": 0.3})
    _, curve = train(data, compute, tmp_path, recipe)
    values = [metrics[monitor] for metrics in curve]
    best = max(range(len(values)), key=lambda i: (values[i] if monitor == "val_top1" else -values[i], i))
    assert len(curve) == min(best + 1 + 2, 12)
    model, again = train(data, compute, tmp_path, recipe)  # from the finished checkpoint
    assert again == curve
    found = supervised_metrics(model, ValidationView(data[1], 32, 36, 8), compute)
    assert found["val_loss"] == pytest.approx(curve[best]["val_loss"], rel=1e-6)


def test_the_average_of_weights_is_what_is_kept(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    plain, _ = train(data, compute, tmp_path / "a")
    averaged, curve = train(data, compute, tmp_path / "b", RECIPE.model_copy(update={"ema": 0.99}))
    assert not same_weights(plain, averaged)
    found = supervised_metrics(averaged.eval(), ValidationView(data[1], 32, 36, 8), compute)
    assert found["val_loss"] == pytest.approx(curve[-1]["val_loss"], rel=1e-6)


def test_parts_of_a_batch_add_up_to_the_whole(compute: Compute, data: tuple[Samples, Samples], tmp_path: Path) -> None:
    """Where nothing looks at a batch as one, as norms do: the gradients are the same but for rounding."""
    curves = []
    for parts in (1, 4):
        recipe = RECIPE.model_copy(update={"epochs": 1, "accumulate": parts, "lr": 1e-3})
        model = build(SMALL, seed=1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.requires_grad_(False)
        objective = Supervised(model, recipe, ValidationView(data[1], 32, 36, 8), compute)
        groups = [(list(model.parameters()), recipe.lr)]
        feed = train_batches(data[0], recipe, compute)
        setup = Setup("t", model, groups, feed, objective, recipe, 32, compute)
        curves.append(fit(setup, tmp_path / str(parts), lambda *_: None))
    assert curves[0][0]["train_loss"] == pytest.approx(curves[1][0]["train_loss"], rel=1e-4)


def test_progressive_resizing_grows_evenly_and_ends_at_the_full_size() -> None:
    recipe = Recipe(epochs=10, start_size=64, full_size_from=0.6)
    found = [size_in(epoch, recipe, 128) for epoch in range(1, 11)]
    assert found == [64, 80, 88, 96, 112, 120, 128, 128, 128, 128]
    assert list(sizes(recipe, 128)) == [64, 80, 88, 96, 112, 120, 128]
    assert sizes(recipe, 128)[64] == "`start_size` to `end_size`" and sizes(recipe, 128)[128] == "`model.image_size`"
    assert set(sizes(Recipe(end_size=64), 32)) == {32, 64}, "all that the network must take, known before training"
    assert [size_in(each, Recipe(epochs=3, start_size=64, full_size_from=0), 128) for each in (1, 2)] == [128, 128]
    assert size_in(1, Recipe(), 128) == 128
    assert [size_in(each, Recipe(epochs=2, end_size=112), 128) for each in (1, 2)] == [112, 112]


def test_a_frozen_norm_keeps_its_statistics_and_the_head_alone_changes(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    model = build(SMALL, seed=1)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    recipe = Finetune(epochs=1, batch_size=8, lr=0.1, strategy="head")
    groups = STRATEGIES["head"](model, recipe)
    objective = Supervised(model, recipe, ValidationView(data[1], 32, 36, 8), compute)
    feed = train_batches(data[0], recipe, compute)
    fit(Setup("t", model, groups, feed, objective, recipe, 32, compute), tmp_path, lambda *_: None)
    changed = {name for name, value in model.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


# -------------------------------------------------------------------------------------------------- what is wrong, said


@every_step
def test_a_loss_that_is_not_finite_stops_names_step_and_rate_and_leaves_the_last_good_checkpoint(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    recipe = RECIPE.model_copy(update={"lr": 1e20, "warmup": 0.0})
    with pytest.raises(StageError, match=r"the loss is nan at step \d of epoch 1, at a learning rate of .*lower `lr`"):
        train(data, compute, tmp_path, recipe)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state and state["step"] >= 1
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_weights_that_a_last_step_broke_are_not_kept(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    """Its own loss was finite, no later one sees them, and without val nobody looks."""
    recipe = RECIPE.model_copy(update={"lr": 1e38, "warmup": 0.0, "epochs": 1, "batch_size": 32})
    words = r"weights are not finite after step 1 of epoch 1, at a learning rate of 1e\+38, and no loss would be; lower"
    with pytest.raises(StageError, match=words):
        train((data[0], data[1].at([])), compute, tmp_path, recipe)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_batch_larger_than_the_data_is_refused(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="`batch_size` is 64, but there are only 32 training images"):
        train(data, compute, tmp_path, RECIPE.model_copy(update={"batch_size": 64}))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 6, "accumulate": 3}, "`accumulate: 3` leave parts of fewer than 2 of the 5 images of a batch"),
        ({"start_size": 48}, r"`start_size` is 48, more than `model.image_size` \(32\)"),
    ],
)
def test_what_cannot_be_done_with_these_images_is_refused(
    changed: dict[str, Any], words: str, data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=words):
        train(data, compute, tmp_path, RECIPE.model_copy(update=changed))


def test_early_stopping_without_what_it_watches_is_refused(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path
) -> None:
    recipe = RECIPE.model_copy(update={"patience": 1})
    with pytest.raises(StageError, match="`patience` watches `val_loss`, which is not measured here"):
        train((data[0], data[1].at([])), compute, tmp_path, recipe)


def test_a_number_of_steps_that_is_none_is_refused(
    data: tuple[Samples, Samples], compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(saving.CHECKPOINT_STEPS, "often")
    with pytest.raises(StageError, match="SYNSET_CHECKPOINT_STEPS must be a number of steps, got 'often'"):
        train(data, compute, tmp_path)
