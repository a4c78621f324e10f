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
from stages.training.loop.adversarial import Guard
from stages.training.loop.mixing import Mixer
from stages.training.loop.processes import rank, share_buffers, summed, world_size
from stages.training.networks.attacks import attacked, count_robust
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier

Metrics = dict[str, float]


class Objective(Protocol):
    """A loss, and the measures taken after each epoch."""

    global_loss: bool
    """Whether the loss is over the images of all processes, instead of this process's."""
    has_labels: bool
    """Whether correct answers are counted: without labels there are none."""
    metric_names: tuple[str, ...]
    """The metrics that `measure` returns."""

    def loss(self, forward: nn.Module, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The mean loss () of a part of a batch, and how many of its images were classified correctly, () int64."""

    def measure(self, model: Classifier) -> Metrics:
        """Metrics on val, over all processes."""

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs besides the weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""


@dataclass(frozen=True)
class ValidationView:
    """How validation images are preprocessed and batched."""

    val: Samples
    image_size: int
    """Side of the centre crop, in pixels."""
    resize: int
    """Shorter side before the crop, in pixels."""
    batch_size: int

    def batches(self, samples: Samples, compute: Compute) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the samples, each exactly once over all processes."""
        return evaluation_batches(
            samples,
            image_size=self.image_size,
            resize=self.resize,
            batch_size=self.batch_size,
            threads=compute.threads,
            device=compute.device,
            rank=rank(),
            world_size=world_size(),
        )


def validation_batch_size(recipe: Recipe) -> int:
    """Images in one validation batch of a process: twice a training part's, since no gradients are kept."""
    return max(2 * recipe.batch_size // (recipe.accumulate * world_size()), 1)


class Supervised:
    """Cross-entropy with labels; on mixed or adversarial images where the recipe says so."""

    global_loss = False
    has_labels = True

    def __init__(self, model: Classifier, recipe: Recipe, view: ValidationView, compute: Compute) -> None:
        self.model, self.recipe, self.view, self.compute = model, recipe, view, compute
        self.mixer = Mixer(recipe.mixup, recipe.cutmix, model.head.out_features)
        self.guard = Guard() if recipe.adversarial and recipe.adversarial.method == "fgsm" else None
        self.metric_names: tuple[str, ...] = ("val_loss", "val_top1") if len(view.val) else ()
        if recipe.adversarial and len(view.val):
            self.metric_names += ("val_robust_top1",)

    def loss(self, forward: nn.Module, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Smoothed cross-entropy; auxiliary heads add theirs, times the architecture's weight."""
        if self.recipe.adversarial:
            images = self._attacked(images, labels, step)
        images, targets = self.mixer(images, labels)
        with self.compute.autocast():
            outputs = forward(images)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
            for output in auxiliary:
                more = F.cross_entropy(output, targets, label_smoothing=self.recipe.label_smoothing)
                loss = loss + self.model.auxiliary_weight * more
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _attacked(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        assert self.recipe.adversarial
        share_buffers(self.model)  # attacks see the running statistics, which are process 0's
        with self.compute.autocast():
            if self.guard:
                return self.guard.attacked(self.model, images, labels, self.recipe.adversarial, step)
            return attacked(self.model, images, labels, self.recipe.adversarial)

    def measure(self, model: Classifier) -> Metrics:
        """Mean cross-entropy and top-1 on val, and top-1 under attack; nothing where val is empty."""
        if not len(self.view.val):
            return {}
        metrics = supervised_metrics(model, self.view, self.compute)
        if self.recipe.adversarial:
            metrics["val_robust_top1"] = robust_top1(model, self.view, self.recipe.adversarial, self.compute)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The guard's state."""
        return self.guard.state_dict() if self.guard else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the guard's state."""
        if self.guard:
            self.guard.load_state_dict(state)


def supervised_metrics(model: Classifier, view: ValidationView, compute: Compute) -> Metrics:
    """Mean cross-entropy and top-1 on val, over all processes; `model` in evaluation mode."""
    sums = torch.zeros(2, dtype=torch.float64, device=compute.device)
    with torch.inference_mode(), compute.autocast():
        for images, labels in view.batches(view.val, compute):
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()])
    loss_sum, correct = summed(sums).tolist()
    return {"val_loss": loss_sum / len(view.val), "val_top1": correct / len(view.val)}


def robust_top1(model: Classifier, view: ValidationView, settings: Adversarial, compute: Compute) -> float:
    """Top-1 under PGD of the first `val_images` of val; val was shuffled when its shards were written."""
    samples = view.val.at(range(min(settings.val_images, len(view.val))))
    correct = torch.zeros((), dtype=torch.float64, device=compute.device)
    with compute.autocast():
        for number, (images, labels) in enumerate(view.batches(samples, compute)):
            correct += count_robust(model, images, labels, settings, seed=number)
    return summed(correct).item() / len(samples)
