"""The loop: epochs of training, a look at val after each, a checkpoint, and the curves.

An epoch depends on the weights and optimiser before it and on (seed, epoch) alone: order, crops and dropout are drawn
anew from those two. So a checkpoint an epoch is all that an exact resume needs.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.command import StageError
from stages.data.loading import Samples, evaluation_batches, training_batches
from stages.params.load import Section
from stages.progress import progress
from stages.training.checkpoints import load_checkpoint, save_checkpoint
from stages.training.devices import Compute
from stages.training.models import Classifier
from stages.training.optimisation import one_cycle, sgd

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
SECONDS_BETWEEN_CHECKPOINTS = 15
"""At least: flushing all weights to the disk after every epoch of a second would take longer than the epochs."""


@dataclass(frozen=True)
class Recipe:
    """What the loop needs to know, from the sections `pretrain` or `finetune` and `model`."""

    epochs: int
    batch_size: int
    weight_decay: float
    label_smoothing: float
    warmup: float
    min_crop_area: float
    seed: int
    image_size: int
    resize: int
    patience: int | None = None

    @classmethod
    def of(cls, section: Section, image_size: int, resize: int) -> "Recipe":
        """The recipe that the section `pretrain` or `finetune` describes; sizes in pixels."""
        shared = {each.name for each in fields(cls)} & set(type(section).model_fields)
        return cls(**section.model_dump(include=shared), image_size=image_size, resize=resize)


def fit(
    model: Classifier,
    groups: list[tuple[list[nn.Parameter], float]],
    train: Samples,
    val: Samples,
    recipe: Recipe,
    compute: Compute,
    work: Path,
    on_epoch: Callable[[Metrics, int], None],
    name: str,
) -> list[Metrics]:
    """Trains `model` in place and returns its curve, a dict an epoch.

    Args:
        groups: parameters to train with their peak learning rate.
        val: may be empty; then there is no val loss and no early stopping.
        work: folder for the checkpoint; one found there is continued from.
        on_epoch: called with the metrics of every epoch trained here and its number (from 1).

    Raises:
        StageError: nothing to train on, or the loss is no longer finite.
    """
    if not len(train):
        raise StageError(f"{name}: there is no labelled training image")
    compute.place(model)
    optimiser = sgd(groups, recipe.weight_decay)
    steps = -(-len(train) // recipe.batch_size)
    schedule = one_cycle(optimiser, recipe.epochs * steps, recipe.warmup)
    checkpoint = work / f"{name}.pt"
    curve, best = _resume(checkpoint, model, optimiser, schedule, compute)
    saved = time.monotonic()
    while not _finished(curve, recipe):
        epoch = len(curve) + 1
        started = time.monotonic()
        metrics: Metrics = {"epoch": epoch, "lr": float(schedule.get_last_lr()[-1])}
        metrics |= _train_epoch(model, optimiser, schedule, train, recipe, compute, epoch, f"{name}, epoch {epoch}")
        rate = len(train) / (time.monotonic() - started)
        metrics |= validation_metrics(model, val, recipe, compute)
        _check_finite(metrics, name)
        curve.append(metrics)
        if recipe.patience and len(val) and metrics["val_loss"] <= min(each["val_loss"] for each in curve):
            best = {key: value.clone() for key, value in model.net.state_dict().items()}
        if time.monotonic() - saved >= SECONDS_BETWEEN_CHECKPOINTS or _finished(curve, recipe):
            _save(checkpoint, model, optimiser, schedule, curve, best)
            saved = time.monotonic()
        on_epoch(metrics | {"images_per_second": rate}, epoch)
        logger.info("%s: epoch %d of %d, %s, %.0f images/s", name, epoch, recipe.epochs, _describe(metrics), rate)
    if best is not None:
        model.net.load_state_dict(best)
    return curve


def validation_metrics(model: Classifier, val: Samples, recipe: Recipe, compute: Compute) -> Metrics:
    """Mean cross-entropy and top-1 on the val images; empty where there are none."""
    if not len(val):
        return {}
    model.eval()
    loss, hits = 0.0, 0
    batches = evaluation_batches(
        val, image_size=recipe.image_size, resize=recipe.resize, batch_size=2 * recipe.batch_size,
        threads=compute.threads, device=compute.device,
    )  # fmt: skip
    with torch.inference_mode(), compute.autocast():
        for images, labels in batches:
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            hits += int((logits.argmax(1) == labels).sum())
    return {"val_loss": loss / len(val), "val_top1": hits / len(val)}


def _train_epoch(
    model: Classifier,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    train: Samples,
    recipe: Recipe,
    compute: Compute,
    epoch: int,
    what: str,
) -> Metrics:
    torch.manual_seed(recipe.seed * 1_000_003 + epoch)
    _training_mode(model)
    batches = training_batches(
        train, image_size=recipe.image_size, batch_size=recipe.batch_size, min_crop_area=recipe.min_crop_area,
        seed=recipe.seed, epoch=epoch, threads=compute.threads, device=compute.device,
    )  # fmt: skip
    # Sums stay on the device: reading one back each step would make the GPU wait.
    loss_sum = torch.zeros((), device=compute.device)
    hits = torch.zeros((), device=compute.device, dtype=torch.int64)
    for images, labels in progress(batches, -(-len(train) // recipe.batch_size), what):
        loss, logits = _step(model, optimiser, images, labels, recipe, compute)
        schedule.step()
        loss_sum += loss * len(labels)
        hits += (logits.argmax(1) == labels).sum()
    return {"train_loss": loss_sum.item() / len(train), "train_top1": hits.item() / len(train)}


def _step(
    model: Classifier,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    compute: Compute,
) -> tuple[Tensor, Tensor]:
    optimiser.zero_grad(set_to_none=True)
    with compute.autocast():
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    loss.backward()
    optimiser.step()
    return loss.detach(), logits.detach()


def _check_finite(metrics: Metrics, name: str) -> None:
    for key in ("train_loss", "val_loss"):
        if not math.isfinite(metrics.get(key, 0.0)):
            raise StageError(
                f"{name}: {key} is {metrics[key]} in epoch {metrics['epoch']}, begun with a learning rate of "
                f"{metrics['lr']:g}; lower `lr`, or lengthen `warmup`"
            )


def _training_mode(model: nn.Module) -> None:
    """Training mode, but for modules whose own weights are frozen: a frozen norm keeps its running statistics too."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _save(
    checkpoint: Path,
    model: Classifier,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    curve: list[Metrics],
    best: dict[str, Any] | None,
) -> None:
    state = {"model": model.net.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint(checkpoint, state | {"curve": curve, "best": best})


def _resume(
    checkpoint: Path,
    model: Classifier,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    compute: Compute,
) -> tuple[list[Metrics], dict[str, Any] | None]:
    state = load_checkpoint(checkpoint, compute.device)
    if state is None:
        return [], None
    model.net.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    logger.info("%s: continuing after epoch %d", checkpoint.stem, len(state["curve"]))
    return state["curve"], state["best"]


def _finished(curve: list[Metrics], recipe: Recipe) -> bool:
    if len(curve) >= recipe.epochs:
        return True
    losses = [metrics["val_loss"] for metrics in curve if "val_loss" in metrics]
    if not recipe.patience or not losses:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= recipe.patience


def _describe(metrics: Metrics) -> str:
    shown = [f"loss {metrics['train_loss']:.3f}"]
    if "val_loss" in metrics:
        shown.append(f"val loss {metrics['val_loss']:.3f}, val top-1 {metrics['val_top1']:.3f}")
    return ", ".join(shown)
