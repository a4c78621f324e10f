"""A made-up collection the size of ImageNet: rows of facts without their images, but for a few in one small raw tar.

Perceptual hashes of photographs are not random numbers: neighbouring cells hang together, and some grounds are even.
So each hash here is of a drawn field of 9 x 8 cells whose spectrum falls off as that of photographs does; `STRUCTURE`
and `GRAIN` are set so that as many pairs lie within 6, 8 and 10 bits as among 21,468 images of Imagenette and Tiny
ImageNet. `CHANCE` adds what those have more of: different pictures of close hash and alike light, so that there are
about as many pairs to confirm as these collections foretell for 1.28 million images (200,000). What has to be confirmed
on pixels is confirmed on pixels: every row points to a real JPEG, and the two of a planted near-duplicate to two
codings of one picture.
"""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

PICTURES = 400
CLASSES = 1000
IMAGENET = 1_331_167
VAL_SHARE = 50_000 / IMAGENET
STRUCTURE, GRAIN = 0.8, 1.0
CHANCE = 0.08
"""Share of images of a collection the size of ImageNet; of a smaller one it is as many times smaller."""
PLAIN = 0.0015
"""Share of images of a small thing on an even ground."""
EXACT, NEAR, BROKEN, DARK, HUGE = 0.002, 0.003, 0.0005, 0.0002, 0.0001
"""Shares of what is planted: copies, recoded copies, broken files, and outliers."""
COLLAPSED = 0.6
"""Share of the first class's images that are one picture, recoded."""
SIZES = [(500, 375), (500, 333), (375, 500), (333, 500), (500, 500), (1024, 768), (1280, 960), (250, 188), (200, 150)]
SIZE_SHARES = [0.34, 0.22, 0.08, 0.06, 0.08, 0.07, 0.03, 0.08, 0.04]


@dataclass(frozen=True)
class Planted:
    """Keys of what was planted: both images of each pair, and the rest."""

    exact: list[tuple[str, str]]
    near: list[tuple[str, str]]
    broken: list[str]
    dark: list[str]
    huge: list[str]
    collapsed: str
    """Name of the class."""


def write_pictures(path: Path, seed: int) -> pd.DataFrame:
    """A raw tar of `PICTURES` drawn photographs of 500 x 375, each followed by itself coded again; their places."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(PICTURES):
            coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            picture = coarse.resize((500, 375), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
            grain = rng.normal(0, 12, (375, 500, 1))
            picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
            for name, quality in (("a", 90), ("b", 80)):
                buffer = io.BytesIO()
                picture.save(buffer, "JPEG", quality=quality)
                member = tarfile.TarInfo(f"{number:04d}-{name}.JPEG")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)
    with tarfile.open(path) as tar:
        places = [(member.offset_data, member.size) for member in tar]
    return pd.DataFrame(places, columns=["offset", "bytes"])


def made_up_facts(batch: str, rows: int, tar: str, places: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, Planted]:
    """Facts of a labelled batch with the splits train and val, and what was planted in them.

    Args:
        batch: its name.
        rows: how many images.
        tar: the raw tar that `places` are of, relative to the batch's folder.
        places: as `write_pictures` gives them.
        seed: of all chance.
    """
    rng = np.random.default_rng(seed)
    split = np.where(rng.random(rows) < VAL_SHARE, "val", "train").astype(object)
    names = np.array([f"n{10_000_000 + 1_371 * number}" for number in range(CLASSES)], dtype=object)
    # As in ImageNet: most classes are full, some have hardly more than half.
    weight = np.minimum(rng.uniform(0.55, 3.0, CLASSES), 1.0)
    class_name = names[rng.choice(CLASSES, rows, p=weight / weight.sum())]
    sizes = np.array(SIZES)[rng.choice(len(SIZES), rows, p=SIZE_SHARES)] + rng.integers(-12, 13, (rows, 2))
    picture = 2 * rng.integers(0, PICTURES, rows)
    digests = rng.bytes(32 * rows).hex()
    facts = pd.DataFrame(
        {
            "key": [f"{batch}/{s}/{c}/{c}_{n}.JPEG" for n, (s, c) in enumerate(zip(split, class_name, strict=True))],
            "batch": batch,
            "source_split": split,
            "class_name": class_name,
            "tar": tar,
            "sha256": [digests[64 * number : 64 * (number + 1)] for number in range(rows)],
            "format": "JPEG",
            "width": sizes[:, 0],
            "height": sizes[:, 1],
            "mode": np.where(rng.random(rows) < 0.015, "L", "RGB"),
            "orientation": 1,
            "decodes": True,
            "error": "",
            "hash": _hashes(rng, rows),
            "brightness": np.clip(rng.normal(117, 32, rows), 4, 251),
            "contrast": np.clip(rng.normal(58, 15, rows), 5, 120),
        }
    )
    some = rng.permutation(rows)[: int(CHANCE * rows * rows / IMAGENET)]
    _look_like(facts, rng.integers(0, rows, len(some)), some, bits=6, light=4.0, rng=rng)
    planted = _plant(facts, picture, names[0], rng)
    facts["offset"], facts["bytes"] = places["offset"].to_numpy()[picture], places["bytes"].to_numpy()[picture]
    return facts, planted


def _hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) uint64: difference hashes of fields of 8 rows and 9 columns."""
    fall_off = [
        (1.0 + row**2 + column**2) ** -STRUCTURE * np.outer(_cosine(8, row), _cosine(9, column)).reshape(-1)
        for row in range(8)
        for column in range(9)
    ]
    waves = np.array(fall_off, dtype=np.float32)
    hashes = np.empty(count, dtype=np.uint64)
    for start in range(0, count, 100_000):
        some = min(100_000, count - start)
        field = rng.standard_normal((some, 72), dtype=np.float32) @ waves
        field += GRAIN * np.abs(waves).mean() * rng.standard_normal(field.shape, dtype=np.float32)
        cells = field.reshape(some, 8, 9)
        bits = cells[:, :, :-1] < cells[:, :, 1:]
        even = rng.random(some) < PLAIN
        bits[even] = rng.random((int(even.sum()), 8, 8)) < 0.05
        hashes[start : start + some] = np.packbits(bits.reshape(some, 64), axis=1).view(">u8")[:, 0]
    return hashes


def _cosine(length: int, frequency: int) -> np.ndarray:
    return np.cos(np.pi * frequency * (np.arange(length) + 0.5) / length)


def _plant(facts: pd.DataFrame, picture: np.ndarray, collapsed: str, rng: np.random.Generator) -> Planted:
    """Changes rows, and the pictures that they point to."""
    rows = len(facts)
    counts = [max(int(share * rows), 1) for share in (EXACT, EXACT, NEAR, NEAR, BROKEN, DARK, HUGE)]
    free = np.flatnonzero((facts["class_name"] != collapsed).to_numpy())
    parts = np.split(rng.permutation(free)[: sum(counts)], np.cumsum(counts)[:-1])
    exact, copy, near, recoded, broken, dark, huge = parts
    for fact in ("sha256", "hash", "brightness", "contrast", "width", "height", "mode"):
        facts.loc[copy, fact] = facts[fact].to_numpy()[exact]
    picture[copy] = picture[exact]
    _recode(facts, picture, near, recoded, rng)
    members = np.flatnonzero((facts["class_name"] == collapsed).to_numpy())
    alike = members[: int(COLLAPSED * len(members))]
    _recode(facts, picture, np.repeat(alike[:1], len(alike) - 1), alike[1:], rng)
    facts.loc[broken, "decodes"], facts.loc[broken, "error"] = False, "premature end of JPEG file"
    facts.loc[broken, "hash"] = np.uint64(0)
    facts.loc[broken, ["brightness", "contrast"]] = np.nan
    facts.loc[dark, "brightness"] = rng.uniform(1, 6, len(dark))
    facts.loc[huge, "width"], facts.loc[huge, "height"] = 9000, 7000
    keys = facts["key"].to_numpy(dtype=object)
    return Planted(
        exact=list(zip(keys[exact], keys[copy], strict=True)),
        near=list(zip(keys[near], keys[recoded], strict=True)),
        broken=list(keys[broken]),
        dark=list(keys[dark]),
        huge=list(keys[huge]),
        collapsed=collapsed,
    )


def _recode(
    facts: pd.DataFrame, picture: np.ndarray, source: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> None:
    """Makes `target` the pictures of `source`, coded again."""
    _look_like(facts, source, target, bits=2, light=0.5, rng=rng)
    picture[target] = picture[source] + 1


def _look_like(
    facts: pd.DataFrame, source: np.ndarray, target: np.ndarray, bits: int, light: float, rng: np.random.Generator
) -> None:
    """Hashes of `source` with up to so many bits changed, and its brightness and contrast give or take `light`."""
    hashes = facts["hash"].to_numpy(np.uint64)[source]
    for _ in range(bits):
        flip = np.uint64(1) << rng.integers(0, 64, len(target), dtype=np.uint64)
        hashes = np.where(rng.random(len(target)) < 0.8, hashes ^ flip, hashes)
    facts.loc[target, "hash"] = hashes
    for fact in ("brightness", "contrast"):
        facts.loc[target, fact] = facts[fact].to_numpy()[source] + rng.normal(0, light, len(target))
