"""Training without labels: an objective like the supervised one, of two views of each image."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.data.shards.loading.samples.index import Samples
from stages.params.pretrain import Pretrain
from stages.training.loop.objectives import Looking, Metrics
from stages.training.loop.processes import gathered
from stages.training.methods.contrastive import METHODS, knn_hits, projector
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier, replace_head


class SelfSupervision:
    """Two views of each image, without labels; labels of val only say how well it goes."""

    gathers = True
    recognises = False

    def __init__(
        self, model: Classifier, pretrain: Pretrain, labelled: Samples, looking: Looking, compute: Compute
    ) -> None:
        """Puts the projector where `model` has its head.

        Args:
            labelled: training images with labels, among which val's neighbours are looked for.
        """
        self.settings, self.looking, self.compute = pretrain.self_supervised, looking, compute
        self.method = METHODS[pretrain.method]
        self.width, self.classes = model.head.in_features, model.head.out_features
        self.bias = model.head.bias is not None
        torch.manual_seed(pretrain.seed)
        replace_head(model, projector(self.width, self.settings))
        generator = np.random.default_rng(pretrain.seed)
        among = min(self.settings.neighbour_images, len(labelled))
        self.bank = labelled.at(np.sort(generator.permutation(len(labelled))[:among]))
        self.watched: tuple[str, ...] = ("knn_top1",) if len(self.bank) and len(looking.val) else ()

    def loss(self, forward: nn.Module, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The method's, over the images of all processes. There are no hits."""
        with self.compute.autocast():
            embeddings = forward(images)
        return self.method(embeddings, self.settings), torch.zeros((), dtype=torch.int64, device=images.device)

    def look(self, model: Classifier) -> Metrics:
        """The top-1 of k nearest neighbours (k of `self_supervised.neighbours`); nothing where there are no labels."""
        if not self.watched:
            return {}
        bank, of_bank = self._features(model, self.bank)
        queries, of_queries = self._features(model, self.looking.val)
        hits = knn_hits(bank, of_bank, queries, of_queries, self.settings.neighbours, self.classes)
        return {"knn_top1": hits / len(of_queries)}

    def _features(self, model: Classifier, samples: Samples) -> tuple[Tensor, Tensor]:
        """(N, D) float32 and labels (N,), on the CPU."""
        parts: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode(), self.compute.autocast():
            for images, labels in self.looking.batches(samples, self.compute):
                parts.append((model.features(images).cpu(), labels.cpu()))
        every = [part for mine in gathered(parts) for part in mine]
        return torch.cat([features for features, _ in every]), torch.cat([labels for _, labels in every])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the projector is part of the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
