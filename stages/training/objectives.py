"""What training minimises, and what is measured on val after each epoch: with labels, or without."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.data.loading import Samples, evaluation_batches
from stages.params.pretrain import SelfSupervised
from stages.params.recipe import Recipe
from stages.training.adversarial import Guard, attack_of, perturbed, robust_hits
from stages.training.contrastive import METHODS, knn_hits
from stages.training.devices import Compute
from stages.training.mixing import Mixer
from stages.training.models import Classifier
from stages.training.processes import gathered, rank, share_buffers, summed, world_size

Metrics = dict[str, float]


class Objective(Protocol):
    """A loss, and what is looked at after each epoch."""

    gathers: bool
    """Whether the loss is over the images of all processes, and not over those of this one."""
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


class Supervised:
    """Cross-entropy with labels; mixed images and adversarial ones where the recipe asks for them."""

    gathers = False

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
            return perturbed(self.model, images, labels, self.recipe.adversarial.epsilon, *self._attack(step))

    def look(self, model: Classifier) -> Metrics:
        """Mean cross-entropy and top-1 on val, and top-1 under attack; nothing where val is empty."""
        if not len(self.looking.val):
            return {}
        return supervised_metrics(model, self.looking, self.compute) | self._robust(model)
