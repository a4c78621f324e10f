"""What training is fed with: the batches of an epoch, from any of them on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from stages.data.shards.loading.augmentations import Augmentation
from stages.data.shards.loading.loading import Samples, training_batches
from stages.params.training.recipe import Recipe
from stages.training.loop.processes import rank, world_size
from stages.training.networks.devices import Compute

if TYPE_CHECKING:
    from stages.params.pretrain import SelfSupervised

Batches = Callable[[int, int, int], Iterator[tuple[Tensor, Tensor]]]
"""(epoch, batch to begin with, image size in pixels) -> images (n, 3, S, S) uint8 and labels (n,) int64, on the device.

With two views an image there are 2n images, those of the first view before those of the second.
"""


@dataclass(frozen=True)
class Feed:
    """Training images, for as many epochs as wanted."""

    images: int
    """Over all processes."""
    views: int
    """Crops an image."""
    batches: Batches
    """The part of this process."""


def crops(train: Samples, recipe: Recipe, compute: Compute, self_supervised: "SelfSupervised | None" = None) -> Feed:
    """Random crops of the shards' images, augmented as the recipe says; two an image for self-supervision."""
    own = self_supervised
    augmentation = Augmentation(
        policy=recipe.augment, operations=recipe.rand_operations, magnitude=recipe.rand_magnitude,
        rotation=recipe.rotation, erasing=recipe.erasing,
        jitter=own.jitter if own else 0.0, grey=own.grey if own else 0.0, blur=own.blur if own else 0.0,
    )  # fmt: skip
    views = 2 if own else 1

    def batches(epoch: int, start: int, image_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return training_batches(
            train, image_size=image_size, batch_size=recipe.batch_size, min_crop_area=recipe.min_crop_area,
            flip=recipe.flip, views=views, augmentation=augmentation, seed=recipe.seed, epoch=epoch,
            threads=compute.threads, device=compute.device, start=start, rank=rank(), world_size=world_size(),
        )  # fmt: skip

    return Feed(len(train), views, batches)
