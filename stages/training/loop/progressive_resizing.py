"""Progressive resizing: crops grow over the epochs (Howard 2018; Tan & Le 2021)."""

import math

from stages.params.training.recipe import Recipe

SIZE_STEP = 8
"""Sizes grow in multiples of this many pixels."""


def size_in(epoch: int, recipe: Recipe, image_size: int) -> int:
    """Side of an epoch's crops in pixels; it grows evenly."""
    end = recipe.end_size or image_size
    if recipe.start_size is None:
        return end
    growing = recipe.full_size_from * recipe.epochs
    share = min((epoch - 1) / growing, 1.0) if growing else 1.0
    grown = recipe.start_size + share * (end - recipe.start_size)
    return min(math.ceil(grown / SIZE_STEP) * SIZE_STEP, end)


def sizes(recipe: Recipe, image_size: int) -> dict[int, str]:
    """Sides in pixels of all images that the network will take, each with the keys of params.yaml that ask for it."""
    crops = sorted({size_in(epoch, recipe, image_size) for epoch in range(1, recipe.epochs + 1)})
    return dict.fromkeys(crops, "`start_size` to `end_size`") | {image_size: "`model.image_size`"}
