"""Training batches of one epoch; can start at any step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from stages.data.shards.loading.augmentations import Augmentation
from stages.data.shards.loading.samples.index import Samples
from stages.data.shards.loading.train_loading import TrainLoader
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
    train: Samples,
    recipe: Recipe,
    compute: Compute,
    views: int = 1,
    jitter: float = 0.0,
    grey: float = 0.0,
    blur: float = 0.0,
) -> Feed:
    """Random crops of the shards' images, `views` an image, augmented as the recipe says.

    Args:
        jitter: strength of the colour jitter, 0 to 1; `grey`, `blur`: shares of crops. For self-supervision.
    """
    augmentation = Augmentation(
        policy=recipe.augment,
        operations=recipe.rand_operations,
        magnitude=recipe.rand_magnitude,
        rotation=recipe.rotation,
        jitter=jitter,
        grey=grey,
        blur=blur,
        erasing=recipe.erasing,
    )
    loader = TrainLoader(
        train,
        recipe.batch_size,
        recipe.min_crop_area,
        recipe.seed,
        compute.threads,
        compute.device,
        recipe.flip,
        views=views,
        augmentation=augmentation,
        rank=rank(),
        world_size=world_size(),
    )
    return Feed(len(train), loader.views, loader.batches)
