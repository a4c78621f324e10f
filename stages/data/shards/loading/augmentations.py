"""Augmentations of crops: we draw the random numbers, DALI applies the operations.

DALI's own random numbers depend on what ran before. Here every choice (which operation, how strong, which way) is drawn
from (seed, epoch, place in the epoch) and handed to DALI image by image, so that any batch of any epoch can be made
without those before it, on any number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, types
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite

Floats = npt.NDArray[np.float64]
BINS = 31
"""Number of magnitudes, from none to the largest, as in both papers' code."""
MOST_OPERATIONS = 8
OPERATIONS = 14
"""Number of operations in each policy's list."""
GREY = 128
"""Fills what rotating, shifting or erasing leaves empty."""
ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = (0.3, 3.3)
JITTERED = 0.8
"""Share of images with jittered colours, where jitter is on (Chen et al. 2020, appendix A)."""
SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation, in pixels (Chen et al. 2020)."""
_OF_POLICY = 3 * MOST_OPERATIONS
_DRAWS = _OF_POLICY + 14


@dataclass(frozen=True)
class Augmentation:
    """What is done to crops, in this order; by default nothing."""

    policy: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugment Wide (Müller & Hutter 2021) or RandAugment (Cubuk et al. 2020)."""
    operations: int = 2
    """RandAugment: number of operations, one after the other."""
    magnitude: int = 9
    """RandAugment: strength, of 30."""
    rotation: float = 0.0
    """Maximum rotation in degrees, either direction."""
    jitter: float = 0.0
    """Strength of the colour jitter, 0..1."""
    grey: float = 0.0
    """Share of images made grey."""
    blur: float = 0.0
    """Share of images made blurred."""
    erasing: float = 0.0
    """Share of images with a random window erased (Zhong et al. 2020)."""

    @property
    def is_on(self) -> bool:
        """Whether anything is done at all."""
        return self.policy != "none" or any((self.rotation, self.jitter, self.grey, self.blur, self.erasing))


@dataclass(frozen=True)
class Choices:
    """The random choices for n images, in the types that DALI takes."""

    operation: npt.NDArray[np.int32]
    """(n, operations): index into the policy's list."""
    magnitude: npt.NDArray[np.int32]
    """(n, operations): one of `BINS`."""
    sign: npt.NDArray[np.int32]
    """(n, operations): 1 where the magnitude is negative."""
    angle: npt.NDArray[np.float32]
    """(n,) in degrees."""
    colour: npt.NDArray[np.float32]
    """(n, 4): factors of brightness, contrast and saturation, and a turn of the hue in degrees."""
    sigma: npt.NDArray[np.float32]
    """(n,) in pixels; 0: no blur."""
    erased: npt.NDArray[np.float32]
    """(n, 4): row, column, height and width of the window, in shares of the image; size 0: none is erased."""


def random_draws(generator: np.random.Generator, count: int) -> Floats:
    """The random numbers that decide the augmentation of `count` images, (count, any) in [0, 1)."""
    return generator.random((count, _DRAWS))


def choices(drawn: Floats, augmentation: Augmentation) -> Choices:
    """The choices that random numbers (n, any) stand for."""
    own = augmentation
    levels = own.operations if own.policy == "rand" else 1
    policy = drawn[:, :_OF_POLICY].reshape(-1, 3, MOST_OPERATIONS)[:, :, :levels]
    rest = drawn[:, _OF_POLICY:]
    bins = np.full((len(drawn), levels), own.magnitude) if own.policy == "rand" else policy[:, 1] * BINS
    sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * rest[:, 8]
    return Choices(
        operation=(policy[:, 0] * OPERATIONS).astype(np.int32),
        magnitude=bins.astype(np.int32),
        sign=(policy[:, 2] < 0.5).astype(np.int32),
        angle=(own.rotation * (2 * rest[:, 0] - 1)).astype(np.float32),
        colour=_colours(rest[:, 1:7], own),
        sigma=np.where(rest[:, 7] < own.blur, sigma, 0).astype(np.float32),
        erased=_windows(rest[:, 9:14], own.erasing),
    )


def _colours(drawn: Floats, own: Augmentation) -> npt.NDArray[np.float32]:
    """Brightness, contrast, saturation change by up to 0.8 strength; hue turns by up to 0.2 strength of 360 degrees."""
    strength = own.jitter * (drawn[:, 0] < JITTERED)[:, None]
    colours = np.empty((len(drawn), 4))
    colours[:, :3] = np.maximum(1 + 0.8 * strength * (2 * drawn[:, 1:4] - 1), 0)
    colours[:, 3:] = 360 * 0.2 * strength * (2 * drawn[:, 4:5] - 1)
    colours[:, 2] *= drawn[:, 5] >= own.grey
    return colours.astype(np.float32)


def _windows(drawn: Floats, share: float) -> npt.NDArray[np.float32]:
    area = ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * drawn[:, 0]
    low, high = np.log(ERASED_ASPECT)
    aspect = np.exp(low + (high - low) * drawn[:, 1])
    size = np.minimum(np.sqrt(np.stack([area * aspect, area / aspect], axis=1)), 1)
    size *= (drawn[:, 4] < share)[:, None]
    return np.concatenate([drawn[:, 2:4] * (1 - size), size], axis=1).astype(np.float32)


def needed(augmentation: Augmentation) -> list[str]:
    """The fields of `Choices` that the augmentation uses."""
    own = augmentation
    used = {
        ("operation", "magnitude", "sign"): own.policy != "none",
        ("angle",): own.rotation,
        ("colour",): own.jitter or own.grey,
        ("sigma",): own.blur,
        ("erased",): own.erasing,
    }
    return [name for names, on in used.items() if on for name in names]


def input_types(names: Sequence[str]) -> tuple[list[Any], list[int]]:
    """DALI's types and numbers of dimensions of these fields of `Choices`."""
    whole = ("operation", "magnitude", "sign")
    kinds = [types.INT32 if name in whole else types.FLOAT for name in names]
    return kinds, [0 if name in ("angle", "sigma") else 1 for name in names]


def augmented(images: Any, augmentation: Augmentation, inputs: Sequence[Any], side: int) -> Any:
    """DALI's nodes of the augmented images; called inside a pipeline with `enable_conditionals`.

    Args:
        images: node of (side, side, 3) uint8 on the CPU or on the GPU.
        inputs: nodes of the fields of `Choices` that are `needed`, in that order.
    """
    own = augmentation
    drawn = {name: inputs[place] for place, name in enumerate(needed(own))}
    if own.policy != "none":
        for level in range(own.operations if own.policy == "rand" else 1):
            choice = {name: drawn[name][level] for name in ("operation", "magnitude", "sign")}
            images = _operation(images, own.policy, **choice, side=side)
    if own.rotation:
        images = fn.rotate(images, angle=drawn["angle"], fill_value=GREY, keep_size=True)
    if own.jitter or own.grey:
        colour = drawn["colour"]
        images = fn.color_twist(images, brightness=colour[0], contrast=colour[1], saturation=colour[2], hue=colour[3])
    if own.blur:
        images = _blurred(images, drawn["sigma"])
    if own.erasing:
        erased = drawn["erased"]
        images = fn.erase(
            images, anchor=erased[0:2], shape=erased[2:4], axis_names="HW", normalized=True, fill_value=GREY
        )
    return images


def _operation(images: Any, policy: str, operation: Any, magnitude: Any, sign: Any, side: int) -> Any:
    """One of the policy's operations, with the papers' ranges of magnitudes."""
    suite = get_trivial_augment_wide_suite if policy == "trivial" else get_rand_augment_suite
    # Shifts of at most 32 of 224 pixels (TrivialAugment) and 100 of 224 (RandAugment), in proportion to the crop.
    most = max(1, round(side * (32 if policy == "trivial" else 100) / 224))
    return select(
        suite(max_translate_abs=most),
        operation,
        data=images,
        magnitude_bin=signed_bin(magnitude, random_sign=sign),
        num_magnitude_bins=BINS,
        fill_value=GREY,
    )


def _blurred(images: Any, sigma: Any) -> Any:
    if sigma > 0:
        images = fn.gaussian_blur(images, sigma=sigma)
    return images
