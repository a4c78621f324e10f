"""Training batches of one epoch; can start at any step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stages.data.shards.loading.augmentations import Augmentation
from stages.data.shards.loading.samples.index import Samples
from stages.data.shards.loading.train_loading import TrainLoader
from stages.params.pretrain import SelfSupervised
from stages.params.training.recipe import Recipe
from stages.training.loop.processes import rank, world_size
from stages.training.networks.devices import Compute

Batches = Callable[[int, int, int], Iterator[tuple[Tensor, Tensor]]]
"""(epoch, batch to begin with, image size in pixels) -> images (n, 3, S, S) uint8 and labels (n,) int64, on the device.

With two views an image there are 2n images, those of the first view before those of the second.
"""


@dataclass(frozen=True)
class Feed:
    """Training images, for any number of epochs."""

    images: int
    """Over all processes."""
    views: int
    """Crops an image."""
    batches: Batches
    """This process's part of each batch."""


def train_batches(
    train: Samples, recipe: Recipe, compute: Compute, self_supervised: SelfSupervised | None = None
) -> Feed:
    """Random crops of the shards' images, augmented as the recipe says; two an image for self-supervision."""
    own = self_supervised
    policy = recipe.augment, recipe.rand_operations, recipe.rand_magnitude
    colours = (own.jitter, own.grey, own.blur) if own else (0.0, 0.0, 0.0)
    augmentation = Augmentation(*policy, recipe.rotation, *colours, recipe.erasing)
    crops: dict[str, Any] = {"flip": recipe.flip, "views": 2 if own else 1, "augmentation": augmentation}
    place: dict[str, Any] = {"threads": compute.threads, "device": compute.device}
    place |= {"rank": rank(), "world_size": world_size()}
    loader = TrainLoader(train, recipe.batch_size, recipe.min_crop_area, recipe.seed, **crops, **place)
    return Feed(len(train), loader.views, loader.batches)
