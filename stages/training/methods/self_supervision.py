"""Training without labels, on two views of each image. The backbone is kept, the projector is not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.data.shards.loading.samples.index import Samples
from stages.params.pretrain import Pretrain, SelfSupervised
from stages.training.loop.objectives import Metrics, ValidationView
from stages.training.loop.processes import gathered
from stages.training.methods.embeddings import projector
from stages.training.methods.knn import knn_correct
from stages.training.methods.simclr import simclr
from stages.training.methods.vicreg import vicreg
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier, replace_head

METHODS: dict[str, Callable[[Tensor, SelfSupervised], Tensor]] = {"simclr": simclr, "vicreg": vicreg}


class SelfSupervision:
    """Two views of each image, without labels; labels of val are used only to measure progress."""

    global_loss = True
    has_labels = False

    def __init__(
        self, model: Classifier, pretrain: Pretrain, labelled: Samples, view: ValidationView, compute: Compute
    ) -> None:
        """Replaces the head of `model` by the projector.

        Args:
            labelled: training images with labels, among which the neighbours of val's images are searched.
        """
        self.settings, self.view, self.compute = pretrain.self_supervised, view, compute
        self.method = METHODS[pretrain.method]
        self.width, self.classes = model.head.in_features, model.head.out_features
        self.bias = model.head.bias is not None
        torch.manual_seed(pretrain.seed)
        replace_head(model, projector(self.width, self.settings))
        generator = np.random.default_rng(pretrain.seed)
        bank_size = min(self.settings.neighbour_images, len(labelled))
        self.bank = labelled.at(np.sort(generator.permutation(len(labelled))[:bank_size]))
        self.metric_names: tuple[str, ...] = ("knn_top1",) if len(self.bank) and len(view.val) else ()

    def loss(self, forward: nn.Module, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The method's loss over the images of all processes; nothing is classified, so 0 are correct."""
        with self.compute.autocast():
            embeddings = forward(images)
        return self.method(embeddings, self.settings), torch.zeros((), dtype=torch.int64, device=images.device)

    def measure(self, model: Classifier) -> Metrics:
        """The top-1 of k nearest neighbours (k is `self_supervised.neighbours`); nothing where there are no labels."""
        if not self.metric_names:
            return {}
        bank, bank_labels = self._features(model, self.bank)
        queries, query_labels = self._features(model, self.view.val)
        correct = knn_correct(bank, bank_labels, queries, query_labels, self.settings.neighbours, self.classes)
        return {"knn_top1": correct / len(query_labels)}

    def _features(self, model: Classifier, samples: Samples) -> tuple[Tensor, Tensor]:
        """(N, D) float32 and labels (N,), on the CPU."""
        parts: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode(), self.compute.autocast():
            for images, labels in self.view.batches(samples, self.compute):
                parts.append((model.features(images).cpu(), labels.cpu()))
        of_all = [part for of_process in gathered(parts) for part in of_process]
        return torch.cat([features for features, _ in of_all]), torch.cat([labels for _, labels in of_all])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the projector is part of the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
