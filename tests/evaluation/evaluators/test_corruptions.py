"""Corruptions: deterministic image by image, as strong as stated, and the same thing at every size."""

import io

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stages.evaluation.evaluators.corruptions import CORRUPTIONS, PAPER_SIDE, corrupted, scaled_quality
from stages.params import evaluate

WITHOUT_CHANCE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
RISING = sorted(CORRUPTIONS.keys() - {"elastic_transform"})


def pictures(count: int, height: int, width: int | None = None) -> Tensor:
    """Coloured shapes with edges, texture and slopes, (count, 3, height, width) uint8, the same at every size."""
    y, x = (
        torch.linspace(0, 1, side)[shape] for side, shape in ((height, np.s_[:, None]), (width or height, np.s_[:]))
    )
    made = []
    for number in range(count):
        disc = ((x - 0.3 - 0.05 * number) ** 2 + (y - 0.5) ** 2 < 0.06).float()
        waves = 0.15 * torch.sin(2 * np.pi * (5 + number) * (x + y))
        made.append(torch.stack([0.3 + 0.4 * disc + waves, 0.2 + 0.5 * x * y + waves, 0.6 - 0.4 * disc * y - waves]))
    return (255 * torch.stack(made)).round().clamp(0, 255).to(torch.uint8)


def flat(value: int, side: int, count: int = 4) -> Tensor:
    """Images of one grey."""
    return torch.full((count, 3, side, side), value, dtype=torch.uint8)


def test_all_that_can_be_asked_for_are_there() -> None:
    assert tuple(CORRUPTIONS) == evaluate.CORRUPTIONS
    assert all(len(kind.strengths) == 5 for kind in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 56)])
def test_an_image_depends_on_its_pixels_and_seed_alone(name: str, size: tuple[int, int]) -> None:
    images, seeds = pictures(3, *size), [5, 6, 7]
    for severity in (1, 5):
        together = corrupted(images, name, severity, seeds)
        assert together.shape == images.shape and together.dtype == torch.uint8
        assert not torch.equal(together, images)
        torch.manual_seed(severity)  # chance elsewhere changes nothing
        alone = [corrupted(images[i : i + 1].contiguous(memory_format=torch.channels_last), name, severity, [seeds[i]])
                 for i in range(3)]  # fmt: skip
        assert torch.equal(torch.cat(alone), together)
        assert torch.equal(corrupted(images, name, severity, [8, 9, 10]), together) == (name in WITHOUT_CHANCE)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_black_and_white_images_and_none_are_no_trouble(name: str) -> None:
    for value in (0, 255):
        found = corrupted(flat(value, 32), name, 5, [1, 2, 3, 4])
        # What only moves or mixes pixels has nothing to move here; NaN would have become 0.
        if name in {
            "defocus_blur",
            "glass_blur",
            "motion_blur",
            "zoom_blur",
            "contrast",
            "elastic_transform",
            "pixelate",
        }:
            assert (found == value).all()
    assert len(corrupted(flat(0, 32, 0), name, 1, [])) == 0


@pytest.mark.parametrize("name", RISING)
@pytest.mark.parametrize("side", [56, 128])
def test_each_severity_is_further_from_the_original(name: str, side: int) -> None:
    images, seeds = pictures(4, side), range(4)
    far = [
        (corrupted(images, name, level, seeds).float() - images.float()).abs().mean().item() for level in range(1, 6)
    ]
    assert far == sorted(far) and far[4] > 1.2 * far[0], far


def test_elastic_has_two_slow_severities_that_bend_the_whole_and_three_fast_ones() -> None:
    images, seeds = pictures(16, 128), list(range(16))
    far = [
        (corrupted(images, "elastic_transform", level, seeds).float() - images.float()).abs().mean().item()
        for level in range(1, 6)
    ]
    assert far[0] < far[1] and far[2] < far[3] < far[4] < far[1], far


@pytest.mark.parametrize(("side", "share"), [(224, 1.0), (56, 0.5), (126, 0.75)])
def test_noise_has_the_stated_deviation_and_less_in_small_images(side: int, share: float) -> None:
    images = flat(128, side, 8)

    def noise(name: str, severity: int) -> Tensor:
        return corrupted(images, name, severity, range(8)).float() / 255 - 128 / 255

    assert noise("gaussian_noise", 1).std().item() == pytest.approx(0.08 * share, rel=0.02)
    assert noise("gaussian_noise", 2).std().item() == pytest.approx(0.12 * share, rel=0.02)
    assert noise("shot_noise", 1).std().item() == pytest.approx((128 / 255 / 60) ** 0.5 * share, rel=0.02)
    assert noise("shot_noise", 1).mean().item() == pytest.approx(0, abs=0.002)
    spoilt = corrupted(images, "impulse_noise", 5, range(8))
    assert (spoilt == 255).float().mean().item() == pytest.approx(0.27 * share**2 / 2, rel=0.1)
    assert (spoilt == 0).float().mean().item() == pytest.approx(0.27 * share**2 / 2, rel=0.1)


def test_shot_noise_grows_with_the_light() -> None:
    dark, bright = (corrupted(flat(value, 128), "shot_noise", 1, range(4)).float().std() for value in (16, 144))
    assert (bright / dark).item() == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("side", "severity", "radius"), [(224, 1, 3), (224, 5, 10), (112, 5, 5), (64, 5, 10 * 64 / 224)]
)
def test_defocus_makes_a_disk_of_a_dot(side: int, severity: int, radius: float) -> None:
    dot = flat(0, side, 1)
    square = slice(side // 2 - 2, side // 2 + 3)  # of 5 px: one alone would be too faint for bytes
    dot[:, :, square, square] = 255
    found = corrupted(dot, "defocus_blur", severity, [1])[0, 0].double()
    away = torch.arange(side) - side // 2
    spread = ((away**2 * found).sum() / found.sum()).item()
    assert spread == pytest.approx(radius**2 / 4 + 1 / 6 + 2, rel=0.03)  # disk, pixels, square
    assert found.sum().item() == pytest.approx(25 * 255, rel=0.05)


def test_motion_blur_draws_in_one_direction_by_the_seed() -> None:
    dot = flat(0, 224, 2)
    dot[:, :, 110:115, 110:115] = 255
    for found in corrupted(dot, "motion_blur", 3, [1, 2])[:, 0].double():
        weights = found / found.sum()
        x, y = torch.arange(224.0).double(), torch.arange(224.0).double()[:, None]
        x, y = x - (weights * x).sum(), y - (weights * y).sum()
        covariance = torch.tensor([[(weights * a * b).sum() for a in (x, y)] for b in (x, y)])
        across, along = torch.linalg.eigvalsh(covariance).tolist()
        assert across == pytest.approx(2, abs=0.5)  # of the square
        assert along == pytest.approx(2 + 8**2 * (1 - 2 / np.pi), rel=0.1)  # of half a Gaussian with sigma 8


def test_jpeg_is_jpeg() -> None:
    """Of the stated quality, up to how two builds of libjpeg round."""
    (image,), qualities = pictures(1, PAPER_SIDE), (25, 18, 15, 10, 7)
    decoded = []
    for quality in qualities:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file), np.int64))
    for severity, expected in enumerate(decoded, start=1):
        found = corrupted(image[None], "jpeg_compression", severity, [1])[0].permute(1, 2, 0).numpy()
        far = [np.abs(found - each).mean() for each in decoded]
        assert np.argmin(far) == severity - 1
        assert np.abs(found - expected).mean() < 0.25 * np.abs(found - image.permute(1, 2, 0).numpy()).mean()


def test_jpeg_rounds_in_smaller_steps_where_images_are_smaller() -> None:
    assert [scaled_quality(quality, 1) for quality in (1, 7, 25, 50, 90, 100)] == [1, 7, 25, 50, 90, 100]
    assert [scaled_quality(quality, 64 / 224) for quality in (25, 18, 15, 10, 7)] == [71, 60, 52, 35, 24]


def test_pixelate_leaves_so_many_squares() -> None:
    slope = torch.arange(224).repeat(1, 3, 224, 1).to(torch.uint8)
    for severity, share in enumerate((0.6, 0.5, 0.4, 0.3, 0.25), start=1):
        found = corrupted(slope, "pixelate", severity, [1])
        assert len(found[0, 0, 0].unique()) == round(224 * share)


def test_brightness_raises_value_and_nothing_else() -> None:
    images = pictures(2, 32)
    images[0, :, :4] = 0
    for severity in (1, 5):
        colours = rgb_to_hsv(images.permute(0, 2, 3, 1).numpy() / 255)
        colours[..., 2] = np.minimum(1, colours[..., 2] + severity / 10)
        found = corrupted(images, "brightness", severity, [1, 2]).permute(0, 2, 3, 1).numpy()
        assert np.abs(255 * hsv_to_rgb(colours) - found).max() <= 0.51


def test_contrast_keeps_a_share_of_the_deviation() -> None:
    images = pictures(2, 64)
    found = corrupted(images, "contrast", 1, [1, 2]).float()
    assert torch.allclose(found.mean((2, 3)), images.float().mean((2, 3)), atol=0.2)
    assert torch.allclose(found.std((2, 3)), 0.4 * images.float().std((2, 3)), atol=0.2)


def test_fog_is_clouds_over_all_of_the_range_and_leaves_less_of_the_image() -> None:
    fog = corrupted(flat(255, 64), "fog", 1, range(4)).float() / 255  # white: (1 + 1.5 clouds) / 2.5
    assert torch.allclose(fog.amin((1, 2, 3)), torch.tensor(1 / 2.5), atol=0.01)
    assert torch.allclose(fog.amax((1, 2, 3)), torch.tensor(1.0), atol=0.01)
    rough = [(each[:, :, 1:] - each[:, :, :-1]).abs().mean().item()
             for each in (corrupted(flat(255, 64), "fog", level, range(4)).float() for level in (1, 3, 5))]  # fmt: skip
    assert rough == sorted(rough) and rough[2] > 2 * rough[0]


@pytest.mark.parametrize("name", ["defocus_blur", "zoom_blur", "contrast", "brightness"])
def test_the_same_happens_to_a_smaller_picture(name: str) -> None:
    """Spoilt and then made smaller, or made smaller and then spoilt."""

    def smaller(images: Tensor) -> Tensor:
        return F.interpolate(images.float(), (112, 112), mode="bilinear", antialias=True).round().to(torch.uint8)

    large, seeds = pictures(4, 224), range(4)
    for severity in (2, 5):
        one = smaller(corrupted(large, name, severity, seeds)).float()
        other = corrupted(smaller(large), name, severity, seeds).float()
        change = (one - smaller(large).float()).abs().mean()
        assert (one - other).abs().mean() < 0.15 * change


@pytest.mark.parametrize("name", ["elastic_transform", "motion_blur", "snow"])
@pytest.mark.parametrize("severity", [1, 2, 3, 5])
def test_chance_does_as_much_to_a_smaller_picture(name: str, severity: int) -> None:
    """On a picture without anything small, so that sizes show the same."""
    far = []
    for side in (64, 224):
        images = F.interpolate(pictures(16, 8).float(), (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)
        change = corrupted(images, name, severity, range(16)).float() - images.float()
        far.append(change.abs().mean().item())
    assert far[0] == pytest.approx(far[1], rel=0.25)


def test_errors_are_in_words() -> None:
    images = pictures(2, 32)
    with pytest.raises(ValueError, match=r"unknown corruption 'frost' \(known: gaussian_noise, .*jpeg_compression\)"):
        corrupted(images, "frost", 1, [1, 2])
    with pytest.raises(ValueError, match="severity must be 1 to 5, got 6"):
        corrupted(images, "fog", 6, [1, 2])
    with pytest.raises(ValueError, match="2 images need as many seeds, got 1"):
        corrupted(images, "fog", 1, [1])
    with pytest.raises(
        ValueError, match=r"expected \(n, 3, H, W\) uint8 on the CPU, got \(2, 3, 32, 32\) torch.float32"
    ):
        corrupted(images.float(), "fog", 1, [1, 2])
