"""RandomResizedCrop: windows distributed as torchvision's, pixels as PIL's."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from stages.data.shards.loading.crops import random_draws, resize, windows


def drawn(count: int, height: int, width: int, min_area: float = 0.08) -> np.ndarray:
    """(count, 4): row, column, height and width of windows in images of one size."""
    found = windows(random_draws(np.random.default_rng(1), count, min_area), np.full((count, 2), (height, width)))
    return np.concatenate([found.anchor, found.shape], axis=1)


@pytest.mark.parametrize(("height", "width", "min_area"), [(256, 341, 0.08), (256, 256, 0.35), (300, 90, 0.08)])
def test_windows_are_distributed_as_those_of_torchvision(height: int, width: int, min_area: float) -> None:
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [min_area, 1.0], [3 / 4, 4 / 3]) for _ in range(20_000)]
    )  # fmt: skip
    ours = drawn(20_000, height, width, min_area)
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).statistic < 0.02, column
    assert abs(np.corrcoef(ours.T) - np.corrcoef(theirs.T)).max() < 0.03


def test_windows_lie_inside_and_a_strip_gives_its_largest_middle() -> None:
    for height, width in ((1, 1), (1, 500), (500, 1), (17, 23)):
        row, column, high, wide = drawn(500, height, width).T
        assert row.min() >= 0 and column.min() >= 0 and high.min() >= 1 and wide.min() >= 1
        assert (row + high).max() <= height
        assert (column + wide).max() <= width
    assert drawn(1, 30, 500)[0].tolist() == [0, 230, 30, 40]
    assert drawn(1, 30, 501)[0].tolist() == [0, 230, 30, 40]  # as torchvision halves an odd margin


def test_half_of_the_images_are_mirrored() -> None:
    found = windows(random_draws(np.random.default_rng(1), 10_000, 0.5), np.full((10_000, 2), 64))
    assert 0.48 < found.mirrored.mean() < 0.52


def picture(height: int, width: int) -> np.ndarray:
    """Noise with the sharpness of a photograph."""
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.2)))


def resized(window: np.ndarray, side: int, mirrored: bool = False) -> np.ndarray:
    """The result of `resize` as a new array."""
    out = np.empty((side, side, 3), np.uint8)
    resize(window, mirrored, out)
    return out


@pytest.mark.parametrize(
    ("height", "width"), [(40, 50), (64, 64), (70, 64), (90, 110), (120, 120), (60, 150), (180, 180), (400, 300)]
)  # fmt: skip
def test_pixels_are_those_of_an_antialiased_reduction(height: int, width: int) -> None:
    window = picture(height, width)
    expected = Image.fromarray(window).resize((64, 64), Image.Resampling.BILINEAR)
    error = np.mean((resized(window, 64).astype(float) - np.asarray(expected)) ** 2)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 36


def test_a_window_inside_an_image_may_be_given_and_mirrored() -> None:
    image = picture(200, 200)
    window = image[20:150, 30:170]
    assert np.array_equal(resized(window, 64), resized(window.copy(), 64))
    assert np.array_equal(resized(window, 64, mirrored=True), resized(window, 64)[:, ::-1])
