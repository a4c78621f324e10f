"""What training minimises, and what is measured on val after each epoch; here with labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples
from stages.params.training.recipe import Adversarial, Recipe
from stages.training.loop.adversarial import Guard, attacked, robust_hits
from stages.training.loop.mixing import Mixer
from stages.training.loop.processes import rank, share_buffers, summed, world_size
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier

Metrics = dict[str, float]


class Objective(Protocol):
    """A loss, and what is looked at after each epoch."""

    gathers: bool
    """Whether the loss is over the images of all processes, and not over those of this one."""
    recognises: bool
    """Whether hits are counted: without labels there are none."""
    watched: tuple[str, ...]
    """The names of what `look` measures."""

    def loss(self, forward: nn.Module, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The mean loss () of a part of a batch, and how many of its images were hits, () int64."""

    def look(self, model: Classifier) -> Metrics:
        """Measured on val, over all processes."""

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs besides the weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


@dataclass(frozen=True)
class Looking:
    """How val is looked at."""

    val: Samples
    image_size: int
    """Of the centre crop, in pixels."""
    resize: int
    """Shorter side before it, in pixels."""
    batch_size: int

    def batches(self, samples: Samples, compute: Compute) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the samples, each exactly once over all processes."""
        return evaluation_batches(
            samples, image_size=self.image_size, resize=self.resize, batch_size=self.batch_size,
            threads=compute.threads, device=compute.device, rank=rank(), world_size=world_size(),
        )  # fmt: skip


def evaluated_at_once(recipe: Recipe) -> int:
    """Images of val in one batch of a process: twice those that it trains on at once, since no gradients are kept."""
    return max(2 * recipe.batch_size // (recipe.accumulate * world_size()), 1)


class Supervised:
    """Cross-entropy with labels; mixed images and adversarial ones where the recipe asks for them."""

    gathers = False
    recognises = True

    def __init__(self, model: Classifier, recipe: Recipe, looking: Looking, compute: Compute) -> None:
        self.model, self.recipe, self.looking, self.compute = model, recipe, looking, compute
        self.mixed = Mixer(recipe.mixup, recipe.cutmix, model.head.out_features)
        self.guard = Guard() if recipe.adversarial and recipe.adversarial.method == "fgsm" else None
        self.watched: tuple[str, ...] = ("val_loss", "val_top1") if len(looking.val) else ()
        if recipe.adversarial and len(looking.val):
            self.watched += ("val_robust_top1",)

    def loss(self, forward: nn.Module, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy, smoothed; auxiliary heads add theirs by the architecture's weight."""
        if self.recipe.adversarial:
            images = self._attacked(images, labels, step)
        images, targets = self.mixed(images, labels)
        with self.compute.autocast():
            outputs = forward(images)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
            for each in auxiliary:
                more = F.cross_entropy(each, targets, label_smoothing=self.recipe.label_smoothing)
                loss = loss + self.model.auxiliary_weight * more
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _attacked(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        assert self.recipe.adversarial
        share_buffers(self.model)  # attacks see the running statistics, which are process 0's
        with self.compute.autocast():
            if self.guard:
                return self.guard.attacked(self.model, images, labels, self.recipe.adversarial, step)
            return attacked(self.model, images, labels, self.recipe.adversarial)

    def look(self, model: Classifier) -> Metrics:
        """Mean cross-entropy and top-1 on val, and top-1 under attack; nothing where val is empty."""
        if not len(self.looking.val):
            return {}
        metrics = supervised_metrics(model, self.looking, self.compute)
        if self.recipe.adversarial:
            metrics["val_robust_top1"] = robust_top1(model, self.looking, self.recipe.adversarial, self.compute)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The guard's."""
        return self.guard.state_dict() if self.guard else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The guard's."""
        if self.guard:
            self.guard.load_state_dict(state)


def supervised_metrics(model: Classifier, looking: Looking, compute: Compute) -> Metrics:
    """Mean cross-entropy and top-1 on val, over all processes; `model` in evaluation mode."""
    seen = torch.zeros(2, dtype=torch.float64, device=compute.device)
    with torch.inference_mode(), compute.autocast():
        for images, labels in looking.batches(looking.val, compute):
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            seen += torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()])
    loss_sum, hits = summed(seen).tolist()
    return {"val_loss": loss_sum / len(looking.val), "val_top1": hits / len(looking.val)}


def robust_top1(model: Classifier, looking: Looking, settings: Adversarial, compute: Compute) -> float:
    """Top-1 under PGD of the first `val_images` of val, which were shuffled when shards were written."""
    some = looking.val.at(range(min(settings.val_images, len(looking.val))))
    hits = torch.zeros((), dtype=torch.float64, device=compute.device)
    with compute.autocast():
        for number, (images, labels) in enumerate(looking.batches(some, compute)):
            hits += robust_hits(model, images, labels, settings, seed=number)
    return summed(hits).item() / len(some)
