"""Corruptions of ImageNet-C, in five severities (Hendrycks & Dietterich 2019).

Strengths are the paper's, for images with a side of 224 px. For other sizes, with `scale` = side / 224: lengths in
pixels, the power of noise per pixel (so its standard deviation by the square root), and the quantisation steps of JPEG
are multiplied by `scale`. Shares of the side or of the range of values stay. For 64 px this comes close to what the
authors chose by hand for Tiny-ImageNet-C (docs/robustness.md).

Frost is missing from the benchmark's fifteen kinds: it needs photographs of frost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import scipy.fft
import simplejpeg
import torch
from torch import Tensor
from torch.nn import functional as F

Array = npt.NDArray[Any]

SEVERITIES = 5
PAPER_SIDE = 224
"""Side in pixels of the images that the strengths are made for."""
STREAK_STEP = 0.25
"""Distance in pixels between the points of a streak."""
DISK_POINTS = 64
"""Points across a disk."""


@dataclass(frozen=True)
class Corruption:
    """One kind: `make` takes images (n, 3, H, W) float32 in 0..1, a strength, and a seed per image."""

    make: Callable[[Tensor, Any, Sequence[int]], Tensor]
    strengths: tuple[Any, ...]
    """For severities 1 to 5, as in the paper."""


def corrupted(images: Tensor, name: str, severity: int, seeds: Sequence[int]) -> Tensor:
    """Images corrupted in one way, (n, 3, H, W) uint8. Each depends on its own pixels and seed only.

    Args:
        images: (n, 3, H, W) uint8 on the CPU.
        name: a key of CORRUPTIONS.
        severity: 1 to 5.
        seeds: one per image, 0 or more; kinds without randomness ignore them.

    Raises:
        ValueError: no such kind or severity, images of another type, or not as many seeds as images.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r} (known: {', '.join(CORRUPTIONS)})")
    if not 1 <= severity <= SEVERITIES:
        raise ValueError(f"severity must be 1 to {SEVERITIES}, got {severity}")
    if images.dtype != torch.uint8 or images.device.type != "cpu" or images.shape[1:2] != (3,) or images.ndim != 4:
        raise ValueError(f"expected (n, 3, H, W) uint8 on the CPU, got {tuple(images.shape)} {images.dtype}")
    if len(seeds) != len(images):
        raise ValueError(f"{len(images)} images need as many seeds, got {len(seeds)}")
    if not len(images):
        return images
    kind = CORRUPTIONS[name]
    changed = kind.make(images.contiguous().float() / 255, kind.strengths[severity - 1], seeds)
    return (255 * changed).round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- noise


def _gaussian_noise(images: Tensor, std: float, seeds: Sequence[int]) -> Tensor:
    noise = _drawn(seeds, lambda chance: torch.randn(images.shape[1:], generator=chance))
    return images + math.sqrt(_scale(images)) * std * noise


def _shot_noise(images: Tensor, photons: float, seeds: Sequence[int]) -> Tensor:
    """Photon noise: `photons` per white pixel at the paper's size, more where a pixel covers a larger area."""
    white = photons / _scale(images)
    pairs = zip(images, _generators(seeds), strict=True)
    return torch.stack([torch.poisson(white * image, generator=chance) / white for image, chance in pairs])


def _impulse_noise(images: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
    """This share of all values, channels independently, becomes 0 or 1."""
    share *= _scale(images)
    chance = _drawn(seeds, lambda generator: torch.rand(images.shape[1:], generator=generator))
    return images.masked_fill(chance < share / 2, 0).masked_fill(chance >= 1 - share / 2, 1)


# ---------------------------------------------------------------------------------------------------------------- blur


def _defocus_blur(images: Tensor, radius: float, _: Sequence[int]) -> Tensor:
    kernel = _disk(radius * _scale(images))
    return _each(images, lambda image: cv2.filter2D(image, -1, kernel))


def _disk(radius: float) -> Array:
    along = (np.arange(DISK_POINTS) + 0.5) * 2 * radius / DISK_POINTS - radius
    x, y = (each.ravel() for each in np.meshgrid(along, along))
    inside = x**2 + y**2 <= radius**2
    return _kernel(x[inside], y[inside], np.ones(inside.sum()))


def _glass_blur(images: Tensor, strength: tuple[float, float, int], seeds: Sequence[int]) -> Tensor:
    """Blurred, pixels moved `times` times by up to `reach`, blurred again.

    The paper swaps neighbours one after the other; here all pixels move at once, which is an array operation.
    """
    sigma, reach, times = strength
    sigma, reach = sigma * _scale(images), reach * _scale(images)
    moves = _drawn(seeds, lambda chance: 2 * torch.rand((times, 2, *images.shape[2:]), generator=chance) - 1)
    images = _smoothed(images, sigma)
    for move in moves.unbind(1):
        images = _sampled(images, _positions(images) + reach * move)
    return _smoothed(images, sigma)


def _motion_blur(images: Tensor, strength: tuple[float, float], seeds: Sequence[int]) -> Tensor:
    radius, sigma = (each * _scale(images) for each in strength)
    kernels = [_streak(radius, sigma, 90 * turn - 45) for turn in _turns(seeds)]
    each = zip(_arrays(images), kernels, strict=True)
    return _tensors([cv2.filter2D(image, -1, kernel) for image, kernel in each])


def _streak(radius: float, sigma: float, degrees: float) -> Array:
    """Half a Gaussian from the centre in one direction, at most 2 `radius` long."""
    length = min(2 * radius, 4 * sigma)
    along = np.arange(0, length, STREAK_STEP)
    x, y = along * math.cos(math.radians(degrees)), along * math.sin(math.radians(degrees))
    return _kernel(x, y, np.exp(-0.5 * (along / sigma) ** 2))


def _kernel(x: Array, y: Array, weights: Array) -> Array:
    """Kernel of points (P,), pixels from the centre, each spread over the four pixels around it; odd sides, sum 1."""
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    half = int(max(abs(left).max(), abs(top).max())) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    for right, below in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (1 - abs(x - left - right)) * (1 - abs(y - top - below))
        np.add.at(kernel, (half + top + below, half + left + right), weights * share)
    return kernel / kernel.sum()


def _zoom_blur(images: Tensor, strength: tuple[float, float], _: Sequence[int]) -> Tensor:
    """Mean of the image and of its centre, enlarged by factors from 1 to `largest`."""
    largest, step = strength
    factors = np.arange(1, largest + step / 2, step)
    total = images.clone()
    for factor in factors.tolist():
        shrink = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(len(images), 2, 3)
        grid = F.affine_grid(shrink, list(images.shape), align_corners=False)
        total += F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return total / (len(factors) + 1)


# ------------------------------------------------------------------------------------------------------------- weather


def _snow(images: Tensor, strength: tuple[float, ...], seeds: Sequence[int]) -> Tensor:
    """Flakes, made at the paper's size and resized, added twice (once rotated by 180°) to a paler image."""
    mean, std, zoom, least, radius, sigma, kept = strength
    cells = math.ceil(PAPER_SIDE / zoom)
    noise = _drawn(seeds, lambda chance: mean + std * torch.randn((1, cells, cells), generator=chance))
    flakes = F.interpolate(noise, (PAPER_SIDE, PAPER_SIDE), mode="bilinear")
    flakes = flakes.masked_fill(flakes < least, 0).clamp(0, 1)
    kernels = [_streak(radius, sigma, 45 + 90 * turn) for turn in _turns(seeds)]
    each = zip(flakes[:, 0].numpy(), kernels, strict=True)
    fallen = torch.stack([torch.from_numpy(cv2.filter2D(layer, -1, kernel)) for layer, kernel in each])[:, None]
    side = max(images.shape[2:])
    layer = F.interpolate(fallen, (side, side), mode="bilinear", antialias=True)
    layer = layer[:, :, : images.shape[2], : images.shape[3]]
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    pale = kept * images + (1 - kept) * torch.maximum(images, 1.5 * grey + 0.5)
    return pale + layer + layer.flip(2, 3)


def _fog(images: Tensor, strength: tuple[float, float], seeds: Sequence[int]) -> Tensor:
    amount, decay = strength
    height, width = images.shape[2:]
    side = 1 << (max(height, width) - 1).bit_length()
    brightest = images.amax((1, 2, 3), keepdim=True)
    foggy = images + amount * _plasma(side, decay, seeds)[:, None, :height, :width]
    return foggy * brightest / (brightest + amount)


def _plasma(side: int, decay: float, seeds: Sequence[int]) -> Tensor:
    """Clouds by diamond and square on a torus (Fournier, Fussell & Carpenter 1982), (n, side, side) in 0..1.

    Points halfway between four others are their mean and a uniform draw, whose range falls by decay² at each halving.
    """
    draws = _drawn(seeds, lambda chance: 2 * torch.rand((side, side), generator=chance) - 1)
    clouds = torch.zeros_like(draws)
    step, reach = side, 1.0
    while step > 1:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        right, below = corners.roll(-1, 2), corners.roll(-1, 1)
        middles = (corners + right + below + right.roll(-1, 1)) / 4 + reach * draws[:, half::step, half::step]
        clouds[:, half::step, half::step] = middles
        across = (corners + right + middles + middles.roll(1, 1)) / 4
        clouds[:, ::step, half::step] = across + reach * draws[:, ::step, half::step]
        down = (corners + below + middles + middles.roll(1, 2)) / 4
        clouds[:, half::step, ::step] = down + reach * draws[:, half::step, ::step]
        step, reach = half, reach / decay**2
    low, high = clouds.amin((1, 2), keepdim=True), clouds.amax((1, 2), keepdim=True)
    return (clouds - low) / (high - low)


def _brightness(images: Tensor, more: float, _: Sequence[int]) -> Tensor:
    """V of HSV rises; hue and saturation stay, so that channels keep their proportion."""
    value = images.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, images * raised / value.clamp(min=1e-6), raised)


# ------------------------------------------------------------------------------------------------------------- digital


def _contrast(images: Tensor, kept: float, _: Sequence[int]) -> Tensor:
    """Values moved towards the mean of each channel."""
    means = images.mean((2, 3), keepdim=True)
    return means + kept * (images - means)


def _elastic(images: Tensor, strength: tuple[float, float, float], seeds: Sequence[int]) -> Tensor:
    """An affine map of three points moved by up to `skew`, and a smooth random field of displacements on top.

    A field is `alpha` times noise blurred by `sigma`, and so as long as alpha / sigma: alpha goes with scale squared.
    """
    scale = _scale(images)
    alpha, sigma, skew = strength[0] * scale**2, strength[1] * scale, strength[2] * scale
    height, width = images.shape[2:]
    draws = 2 * _drawn(seeds, lambda chance: torch.rand(6 + 2 * height * width, generator=chance)) - 1
    middle, reach = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = (middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])).astype(np.float32)
    moved = corners + skew * draws[:, :6].reshape(-1, 3, 2).numpy()
    back = torch.from_numpy(np.stack([cv2.getAffineTransform(each, corners) for each in moved])).float()
    field = alpha * _smooth_fields(draws[:, 6:].reshape(-1, 2, height, width), sigma)
    places = _positions(images) + field
    return _sampled(images, torch.einsum("nij,njhw->nihw", back[:, :, :2], places) + back[:, :, 2, None, None])


def _smooth_fields(fields: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with mirrored borders, as a product of cosine transforms: 170 px cost as little as two."""
    spectrum = scipy.fft.dctn(fields.numpy(), axes=(2, 3), norm="ortho")
    for axis in (2, 3):
        count = fields.shape[axis]
        falls = np.exp(-0.5 * (sigma * np.pi * np.arange(count) / count) ** 2).astype(np.float32)
        spectrum *= falls[:, None] if axis == 2 else falls
    return torch.from_numpy(scipy.fft.idctn(spectrum, axes=(2, 3), norm="ortho"))


def _pixelate(images: Tensor, kept: float, _: Sequence[int]) -> Tensor:
    """Blocks of 1 + (1 / kept - 1) * scale pixels."""
    block = 1 + (1 / kept - 1) * _scale(images)
    height, width = images.shape[2:]
    cells = max(1, round(width / block)), max(1, round(height / block))

    def coarse(image: Array) -> Array:
        small = cv2.resize(image, cells, interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)

    return _each(images, coarse)


def _jpeg(images: Tensor, quality: int, _: Sequence[int]) -> Tensor:
    quality = scaled_quality(quality, _scale(images))

    def through(image: Array) -> Array:
        pixels = np.rint(255 * image).astype(np.uint8)
        encoded = simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420", fastdct=False)
        return np.asarray(simplejpeg.decode_jpeg(encoded, fastdct=False, fastupsample=False), np.float32) / 255

    return _each(images, through)


def scaled_quality(quality: int, scale: float) -> int:
    """The JPEG quality, 1 to 100, whose steps of quantisation are `scale` times as large, by libjpeg's own rule."""
    percent = scale * (5000 / quality if quality < 50 else 200 - 2 * quality)
    return min(100, max(1, round(5000 / percent if percent > 100 else (200 - percent) / 2)))


# --------------------------------------------------------------------------------------------------------------- parts


def _scale(images: Tensor) -> float:
    """Shorter side relative to the paper's."""
    return min(images.shape[2:]) / PAPER_SIDE


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _drawn(seeds: Sequence[int], draw: Callable[[torch.Generator], Tensor]) -> Tensor:
    return torch.stack([draw(chance) for chance in _generators(seeds)])


def _turns(seeds: Sequence[int]) -> list[float]:
    """A number in 0..1 per image, for a direction; independent of everything else drawn from its seed."""
    turns: list[float] = [np.random.default_rng([seed, 1]).random() for seed in seeds]
    return turns


def _arrays(images: Tensor) -> list[Array]:
    return list(images.permute(0, 2, 3, 1).contiguous().numpy())


def _tensors(arrays: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _each(images: Tensor, change: Callable[[Array], Array]) -> Tensor:
    return _tensors([change(image) for image in _arrays(images)])


def _smoothed(images: Tensor, sigma: float) -> Tensor:
    return _each(images, lambda image: cv2.GaussianBlur(image, (0, 0), sigma))


def _positions(images: Tensor) -> Tensor:
    """x and y of every pixel, (2, H, W) float32."""
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in images.shape[2:]), indexing="ij")
    return torch.stack([x, y])


def _sampled(images: Tensor, places: Tensor) -> Tensor:
    """The image at `places`, (n, 2, H, W), between pixels by bilinear interpolation; mirrored beyond the border."""
    sides = torch.tensor([images.shape[3], images.shape[2]], dtype=torch.float32).view(2, 1, 1)
    grid = (2 * places / (sides - 1) - 1).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=True)


CORRUPTIONS = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Corruption(_defocus_blur, (3, 4, 6, 8, 10)),
    "glass_blur": Corruption(_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": Corruption(_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": Corruption(_zoom_blur, ((1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03))),
    "snow": Corruption(
        _snow,
        (
            (0.10, 0.3, 3.0, 0.50, 10, 4, 0.80),
            (0.20, 0.3, 2.0, 0.50, 12, 4, 0.70),
            (0.55, 0.3, 4.0, 0.90, 12, 8, 0.70),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": Corruption(_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(
        _elastic,
        (
            (488.0, 170.8, 24.4),
            (488.0, 19.52, 48.8),
            (12.2, 2.44, 4.88),
            (17.08, 2.44, 4.88),
            (29.28, 2.44, 4.88),
        ),
    ),
    "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(_jpeg, (25, 18, 15, 10, 7)),
}
"""By the paper's names, in its order."""
