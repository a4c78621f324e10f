"""Copies of a picture against photographs of the same scene with something else in it, or taken again."""

import io
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from stages.data.raw.images import decode_strictly, read_header
from stages.data.validation.local_match import DECODED, SIDE, picture_sides, same_locally


def _scene(seed: int = 1, side: int = 224) -> Image.Image:
    """Smooth shapes with some texture."""
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(30, 220, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(cells.resize((side, side), Image.Resampling.BICUBIC), float)
    return _grainy(Image.fromarray(smooth.astype(np.uint8)), 6, seed).filter(ImageFilter.GaussianBlur(0.7))


def _grainy(image: Image.Image, noise: float, seed: int) -> Image.Image:
    pixels = np.asarray(image, float)
    grain = np.random.default_rng(seed).normal(0, noise, pixels.shape[:2])
    return Image.fromarray((pixels + grain[:, :, None]).clip(0, 255).astype(np.uint8))


def _coded(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _same(one: bytes, other: bytes, limit: float = 10.0) -> bool:
    headers = [read_header(one), read_header(other)]
    sides = picture_sides(pd.DataFrame(headers)[["width", "height"]])
    pictures = []
    for data, header, side in zip((one, other), headers, sides.tolist(), strict=True):
        shown = Image.fromarray(decode_strictly(data, header, DECODED)).resize((side, side), Image.Resampling.BOX)
        pictures.append(np.asarray(shown).repeat(SIDE // side, axis=0).repeat(SIDE // side, axis=1))
    return bool(same_locally(np.stack(pictures), sides, np.array([[0, 1]]), limit)[0])


def _resized(scale: float) -> Callable[[Image.Image], bytes]:
    return lambda image: _coded(image.resize((round(image.width * scale), round(image.height * scale))), quality=80)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg 30": lambda image: _coded(image, quality=30),
    "jpeg 95": lambda image: _coded(image, quality=95),
    "webp": lambda image: _coded(image, "WEBP", quality=50),
    "png": lambda image: _coded(image, "PNG"),
    "grey": lambda image: _coded(image.convert("L"), quality=80),
    "a quarter": _resized(0.25),
    "nine tenths": _resized(0.9),
    "twice": _resized(2),
    "brighter": lambda image: _coded(image.point(lambda value: min(255, value + 10)), quality=85),
    "less contrast": lambda image: _coded(ImageEnhance.Contrast(image).enhance(0.8), quality=85),
}


@pytest.mark.parametrize("side", [64, 224])
@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_the_same_picture(copy: str, side: int) -> None:
    scene = _scene(side=side)
    one, other = _coded(scene, quality=90), COPIES[copy](scene)
    assert _same(one, other) and _same(other, one)


@pytest.mark.parametrize("size", [10, 24])
def test_another_object_in_the_scene_is_another_picture(size: int) -> None:
    scene = _scene()
    other = scene.copy()
    ImageDraw.Draw(other).ellipse((100, 90, 100 + size, 90 + size), fill=(255, 255, 255))
    assert not _same(_coded(scene, quality=90), _coded(other, quality=90))
    assert _same(_coded(scene, quality=90), _coded(other, quality=90), limit=255)


def test_another_exposure_of_an_even_scene_is_another_picture_and_its_copy_is_not() -> None:
    ground = Image.new("RGB", (256, 256), (90, 90, 90))
    ImageDraw.Draw(ground).ellipse((60, 60, 200, 200), fill=(170, 170, 170))
    one, other = _grainy(ground, 4, 1), _grainy(ground, 4, 2)
    assert not _same(_coded(one, "PNG"), _coded(other, "PNG"))
    assert not _same(_coded(one, quality=95), _coded(other, quality=95))
    assert all(_same(_coded(one, "PNG"), _coded(one, quality=quality)) for quality in (30, 60, 95))


@pytest.mark.parametrize("length", [8, 20])
@pytest.mark.parametrize("quality", [60, 90])
def test_a_small_scratch_on_a_part_drawn_without_noise_is_another_picture(length: int, quality: int) -> None:
    part = Image.new("RGB", (256, 256), (70, 70, 70))
    ImageDraw.Draw(part).ellipse((40, 40, 216, 216), fill=(170, 170, 170))
    scratched = part.copy()
    ImageDraw.Draw(scratched).line((90, 120, 90 + length, 124), fill=(230, 230, 230), width=2)
    assert not _same(_coded(part, quality=quality), _coded(scratched, quality=quality))
    assert _same(_coded(part, quality=quality), _coded(part, "PNG"))


def test_a_picture_of_few_shapes_is_the_same_as_itself_and_no_other() -> None:
    shapes = []
    for at in (8, 14):
        shape = Image.new("L", (32, 32), 0)
        ImageDraw.Draw(shape).rectangle((at, 6, at + 5, 26), fill=240)
        shapes.append(_coded(shape, "PNG"))
    assert _same(shapes[0], shapes[0]) and not _same(shapes[0], shapes[1])
    flat = _coded(Image.new("L", (40, 40), 80), "PNG")
    assert _same(flat, flat)


def test_pairs_are_judged_alike_alone_and_among_others() -> None:
    rng = np.random.default_rng(5)
    first = np.stack([np.asarray(_scene(seed, 128).convert("L")) for seed in range(40)])
    noisy = (first + rng.normal(0, 14, first.shape)).clip(0, 255).astype(np.uint8)
    pictures, sides = np.concatenate([first, noisy]), np.array([128, 64] * 40)
    pairs = np.stack([np.arange(40).repeat(2), 40 + np.arange(40).repeat(2)], axis=1)
    pairs[1::2, 1] = np.roll(pairs[1::2, 1], 1)
    together = same_locally(pictures, sides, pairs, 10.0)
    assert 0 < together.sum() < len(pairs)
    assert together.tolist() == [bool(same_locally(pictures, sides, pair[None], 10.0)[0]) for pair in pairs]
