"""How often is a copy of a picture taken for another picture, and a photograph of the same scene for a copy?

    python -m bench.near_duplicates_local --photographs FOLDER [FOLDER...] [--frames FOLDER...]

Counted are pairs that thumbnails alone call one picture, as validation did before it compared places, and how many of
them it still does. Copies are of the photographs, recoded, resized, brightened and so on; of copies all should stay.
The rest are different photographs, of which none should: parts of a machine under one camera, drawn, with and without a
scratch; scikit-learn's digits; photographs with an object of another one pasted in, and taken again with other noise;
and frames of a video.
"""

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_digits

from bench.rounds import versions
from stages.data.raw.images import (
    IMAGE_SUFFIXES,
    brightness_and_contrast,
    decode_strictly,
    difference_hash,
    read_header,
)
from stages.data.validation.local_match import DECODED, SIDE, picture_sides, same_locally
from stages.data.validation.near_duplicates import near_pairs
from stages.data.validation.pixel_match import same_thumbnails
from stages.params.validate import Validate
from stages.runtime.files import write_json

LIMITS = Validate()
NOISE, SHIFTS, SCRATCHES, OBJECTS = (0, 2, 4, 8), (0, 2), (0, 8, 20), (12, 20, 32)
PARTS = 40
"""Parts drawn of each kind."""


class Picture(NamedTuple):
    """What validation compares of an image."""

    hash: int
    brightness: float
    contrast: float
    thumbnail: np.ndarray
    larger: np.ndarray
    side: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table of error rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders, searched to their depths")
    parser.add_argument("--frames", type=Path, nargs="*", default=[], help="folders of frames")
    parser.add_argument("--images", type=int, default=150, help="of each folder of photographs")
    parser.add_argument("--json", type=Path, help="writes the figures there too")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for folder in options.photographs:
        files = photographs(folder)
        chosen = [files[number].read_bytes() for number in rng.permutation(len(files))[: options.images].tolist()]
        rows += [row(f"{folder.name}: {name}", pairs, copies=True) for name, pairs in recoded(chosen)]
        rows += [row(f"{folder.name}: {name}", pairs) for name, pairs in scenes(chosen, rng)]
    rows += [row(name, pairs) for name, pairs in inspection(rng)]
    rows.append(row("digits", combinations(digits(), 2)))
    for folder in options.frames:
        frames = [picture(path.read_bytes()) for path in photographs(folder)]
        rows.append(row(f"frames of {folder.name}", combinations(frames, 2)))
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    for copies, name in ((True, "copies lost"), (False, "different pictures taken for one")):
        of = table[table["copies"] == copies]
        wrong = of["alike"].sum() - of["same"].sum() if copies else of["same"].sum()
        print(f"{name}: {wrong} of {of['alike'].sum()} ({wrong / max(of['alike'].sum(), 1):.2%})")
    if options.json:
        write_json(options.json, {"rows": rows, "versions": versions("numpy", "pillow", "simplejpeg")})
    return 0


def photographs(folder: Path) -> list[Path]:
    """All images below a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def row(name: str, pairs: Iterator[tuple[Picture, Picture]], copies: bool = False) -> dict[str, Any]:
    """How many pairs thumbnails call one picture (`alike`), and how many validation does (`same`)."""
    both = list(pairs)
    alike = [two for two in both if looks_alike(*two)]
    return {"kind": name, "copies": copies, "pairs": len(both), "alike": len(alike), "same": sum(map(is_same, alike))}


def looks_alike(one: Picture, other: Picture) -> bool:
    """Whether hash, brightness, contrast and thumbnails agree."""
    if (one.hash ^ other.hash).bit_count() > (LIMITS.near_duplicate_distance or 0):
        return False
    looks = pd.DataFrame([one[:3], other[:3]], columns=["hash", "brightness", "contrast"])
    upper, _ = near_pairs(
        looks.astype({"hash": np.uint64}), LIMITS.near_duplicate_distance or 0, LIMITS.near_duplicate_difference
    )
    thumbnails = np.stack([one.thumbnail, other.thumbnail])
    return len(upper) > 0 and bool(same_thumbnails(thumbnails, np.array([0]), np.array([1]), LIMITS)[0])


def is_same(two: tuple[Picture, Picture]) -> bool:
    """Whether they agree in every place, too."""
    pictures, sides = np.stack([each.larger for each in two]), np.array([each.side for each in two])
    return bool(same_locally(pictures, sides, np.array([[0, 1]]), LIMITS.near_duplicate_local or np.inf)[0])


def picture(data: bytes) -> Picture:
    """An image as validation sees it."""
    header = read_header(data)
    luminance, finer = decode_strictly(data, header), decode_strictly(data, header, DECODED)
    (side,) = picture_sides(pd.DataFrame([header])[["width", "height"]]).tolist()
    larger = _square(finer, side).repeat(SIDE // side, axis=0).repeat(SIDE // side, axis=1)
    looks = difference_hash(luminance), *brightness_and_contrast(luminance)
    return Picture(*looks, _square(luminance, 32).reshape(-1), larger, side)


def _square(luminance: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(luminance).resize((side, side), Image.Resampling.BOX))


def coded(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ copies


def _resized(scale: float, kind: Image.Resampling, quality: int) -> Callable[[Image.Image], bytes]:
    def copy(image: Image.Image) -> bytes:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return coded(image.resize(size, kind), quality=quality)

    return copy


def _brighter(levels: int) -> Callable[[Image.Image], bytes]:
    return lambda image: coded(image.point(lambda value: max(0, min(255, value + levels))), quality=85)


def _contrast(by: float) -> Callable[[Image.Image], bytes]:
    return lambda image: coded(ImageEnhance.Contrast(image).enhance(by), quality=85)


def copies() -> dict[str, Callable[[Image.Image], bytes]]:
    """Ways to make a copy, by what they are called in the table."""
    lanczos, bilinear, nearest = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    return {
        **{f"JPEG {quality}": partial(coded, quality=quality) for quality in (30, 40, 50, 60, 75, 85, 95)},
        **{f"resized {scale}": _resized(scale, lanczos, 85) for scale in (0.25, 0.35, 0.5, 0.7, 0.9, 1.3, 2.0)},
        "resized 0.5 nearest": _resized(0.5, nearest, 85),
        "resized 0.25, JPEG 40": _resized(0.25, bilinear, 40),
        **{f"brightness {levels:+d}": _brighter(levels) for levels in (-10, -6, 6, 10)},
        **{f"contrast {by}": _contrast(by) for by in (0.8, 0.9, 1.1, 1.2)},
        "gamma 0.9": lambda image: coded(image.point(lambda v: round(255 * (v / 255) ** 0.9)), quality=85),
        "grey": lambda image: coded(image.convert("L"), quality=85),
        "PNG": lambda image: coded(image, "PNG"),
        "WebP 50": lambda image: coded(image, "WEBP", quality=50),
    }


def recoded(files: list[bytes]) -> Iterator[tuple[str, Iterator[tuple[Picture, Picture]]]]:
    """Photographs with a copy of each, by the way it is made."""
    originals = [(picture(data), Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
    for name, copy in copies().items():
        yield name, ((original, picture(copy(image))) for original, image in originals)


# ------------------------------------------------------------------------------------------------ different pictures


def scenes(files: list[bytes], rng: np.random.Generator) -> Iterator[tuple[str, Iterator[tuple[Picture, Picture]]]]:
    """Photographs taken again: with an object in the scene, or with other noise."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    for side in OBJECTS:
        yield (
            f"object of {side} px",
            ((picture(coded(image, quality=90)), _with_object(image, images, side, rng)) for image in images),
        )
    for noise in (1, 2, 4, 8):
        yield f"again, noise {noise}", (tuple(_noisy(image, noise, rng) for _ in "12") for image in images)  # type: ignore[misc]


def _with_object(image: Image.Image, others: list[Image.Image], side: int, rng: np.random.Generator) -> Picture:
    other = others[int(rng.integers(len(others)))].resize((side, side))
    scene = image.copy()
    left, top = (int(rng.integers(0, max(1, length - side))) for length in image.size)
    scene.paste(other, (left, top))
    return picture(coded(scene, quality=90))


def _noisy(image: Image.Image, noise: float, rng: np.random.Generator) -> Picture:
    pixels = np.asarray(image, float) + rng.normal(0, noise, (image.height, image.width, 3))
    return picture(coded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), quality=90))


def inspection(rng: np.random.Generator) -> Iterator[tuple[str, Iterator[tuple[Picture, Picture]]]]:
    """A drawn part under one camera, against itself taken again without a scratch or with one."""
    for noise, shift, scratch, quality in product(NOISE, SHIFTS, SCRATCHES, (0, 90)):
        if scratch or noise or shift:
            drawn = (tuple(_part(noise, shift, length, quality, rng) for length in (0, scratch)) for _ in range(PARTS))
            coding = f"JPEG {quality}" if quality else "PNG"
            yield f"part, noise {noise}, moved {shift} px, scratch {scratch} px, {coding}", drawn  # type: ignore[misc]


def _part(noise: float, shift: int, scratch: int, quality: int, rng: np.random.Generator) -> Picture:
    image = Image.new("L", (256, 256), 70)
    draw = ImageDraw.Draw(image)
    x, y = (int(by) for by in rng.integers(-shift, shift + 1, 2))
    draw.ellipse((40 + x, 40 + y, 216 + x, 216 + y), fill=170)
    draw.ellipse((100 + x, 100 + y, 156 + x, 156 + y), fill=60)
    if scratch:
        left, top = 60 + x, int(rng.integers(110, 150)) + y
        draw.line((left, top, left + scratch, top + int(rng.integers(-5, 6))), fill=230, width=2)
    pixels = np.asarray(image, float) + rng.normal(0, noise, (256, 256)) + rng.normal(0, 3)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return picture(coded(image, quality=quality) if quality else coded(image, "PNG"))


def digits() -> list[Picture]:
    """scikit-learn's 1,797 digits of 8 x 8, at 32 x 32."""
    images = ((shade * 15).astype(np.uint8) for shade in load_digits().images)
    return [
        picture(coded(Image.fromarray(shade).resize((32, 32), Image.Resampling.BICUBIC), "PNG")) for shade in images
    ]


if __name__ == "__main__":
    raise SystemExit(main())
