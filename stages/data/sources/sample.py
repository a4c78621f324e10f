"""The built-in sample: drawn objects (shape × colour × texture) as JPEGs, with the dirt of real collections among them.

`upstream` has 12 classes to pretrain on; `target` has 6 others with few labels, put together from the same shapes,
colours and textures, so that what was learned upstream pays. Each picture has a random stream of its own, so any one
is drawn alone.
"""

import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from stages.data.sources.parts import Group, Listed, SourceFile

SAMPLES = ("upstream", "target")
# <shape>_<colour>_<texture>. Every colour and texture, and most shapes, occur in several classes: none decides alone.
CLASSES = {
    "upstream": (
        "fish_blue_checked",
        "fish_yellow_striped",
        "house_green_striped",
        "house_red_dotted",
        "mug_green_dotted",
        "mug_yellow_plain",
        "mushroom_blue_striped",
        "mushroom_red_plain",
        "shirt_green_plain",
        "shirt_red_checked",
        "umbrella_blue_dotted",
        "umbrella_yellow_checked",
    ),
    "target": (
        "fish_green_checked",
        "fish_red_dotted",
        "house_blue_dotted",
        "mug_blue_checked",
        "mug_red_striped",
        "umbrella_green_striped",
    ),
}
# Files a class in each split. The last split is the one tested on: what it holds beats its copies elsewhere.
COUNTS = {"upstream": {"train": 170, "val": 30}, "target": {"train": 42, "val": 20, "test": 110}}

BAD_KINDS = frozenset({"truncated", "zero_byte", "one_pixel", "text", "duplicate", "near_duplicate"})
ACCEPTED_KINDS = frozenset({"png", "webp", "cmyk", "grey", "sixteen_bit", "exif"})  # odd, but fit to train on
MAX_BAD_SHARE = 0.05


class SampleFile(NamedTuple):
    """A file of the sample: its path `<source split>/<class>/<file name>` and its bytes."""

    path: str
    data: bytes


def draw(name: str, seed: int, images_per_class: int | None = None) -> Iterator[SampleFile]:
    """All files of the sample `name` (one of SAMPLES), sorted by path; the same arguments give the same bytes.

    `images_per_class` is how many files a class has over all splits (default: all of them); each split keeps its share
    and at least two, and as much dirt is planted as fits. Raises ValueError for an unknown name.
    """
    plan = _plan(name, seed, images_per_class)
    pictures = {path for pool in _pools(name, images_per_class).values() for path in pool}
    for path in sorted(pictures | plan.keys()):
        data = _dirty_file(plan[path], path, name, seed) if path in plan else _jpeg_file(path, name, seed)
        yield SampleFile(path, data)


def sample_parts(name: str, seed: int, images_per_class: int | None, stamp: str) -> Listed:
    """The sample as a source: a part per class and split, all with the same `stamp`."""
    listed: dict[tuple[str, str], list[SourceFile]] = {}
    for file in draw(name, seed, images_per_class):
        split, class_name, file_name = file.path.split("/")
        listed.setdefault((split, class_name), []).append(SourceFile(file_name, partial(io.BytesIO, file.data)))
    return Listed("the built-in sample", [Group(*key, files, stamp) for key, files in sorted(listed.items())])


def planted(name: str, seed: int, images_per_class: int | None = None) -> dict[str, str]:
    """Path → kind of every planted file. For tests only: whatever detects dirt must not know it."""
    return {path: dirt.kind for path, dirt in _plan(name, seed, images_per_class).items()}


# --- What lies where.


class Dirt(NamedTuple):
    """What is odd about a planted file: a kind, in a variant, and the path of the picture that it repeats, if any."""

    kind: str
    variant: str = ""
    original: str = ""


# The bad ones first, one of each kind before the second, so that a small sample has as many kinds as fit.
# "test" stands for the split tested on; the variant of a truncated file is the share of its bytes that stays.
_DIRT = (
    ("train", Dirt("truncated", "0.5")),
    ("train", Dirt("near_duplicate", "brighter")),
    ("train", Dirt("duplicate", "across")),
    ("train", Dirt("zero_byte")),
    ("train", Dirt("text", "readme.txt")),
    ("train", Dirt("one_pixel")),
    ("train", Dirt("duplicate", "within")),
    ("test", Dirt("truncated", "0.95")),
    ("train", Dirt("near_duplicate", "darker")),
    ("train", Dirt("truncated", "1")),
    ("test", Dirt("duplicate", "within")),
    ("test", Dirt("zero_byte")),
    ("train", Dirt("near_duplicate", "recoded")),
    ("test", Dirt("one_pixel")),
    ("test", Dirt("truncated", "0.75")),
    ("test", Dirt("text", "notes.txt")),
    *((split, Dirt(kind)) for split in ("test", "train") for kind in sorted(ACCEPTED_KINDS)),
)


def _pools(name: str, images_per_class: int | None) -> dict[tuple[str, str], list[str]]:
    """The paths of all pictures, by split and class."""
    if name not in SAMPLES:
        raise ValueError(f"no built-in sample {name!r}; there are {', '.join(SAMPLES)}")
    total = sum(COUNTS[name].values())
    share = min(1.0, (images_per_class or total) / total)
    return {
        (split, class_name): [f"{split}/{class_name}/{index:04d}.JPEG" for index in range(max(2, round(count * share)))]
        for split, count in COUNTS[name].items()
        for class_name in CLASSES[name]
    }


def _plan(name: str, seed: int, images_per_class: int | None) -> dict[str, Dirt]:
    """Which path holds which dirt. It takes the place of pictures (texts come on top), never that of an original."""
    rng = _generator(seed, name, "dirt")
    pools = _pools(name, images_per_class)
    bad_left = math.ceil(MAX_BAD_SHARE * sum(map(len, pools.values()))) - 1
    classes = rng.permutation(CLASSES[name]).tolist()
    # At most half of the pictures of a class and split are replaced or repeated.
    free = {place: rng.permutation(paths)[: (len(paths) + 1) // 2].tolist() for place, paths in pools.items()}
    tested = list(COUNTS[name])[-1]
    plan: dict[str, Dirt] = {}
    for number, (split, dirt) in enumerate(_DIRT):
        class_name = classes[number % len(classes)]
        split = tested if split == "test" else split
        if dirt.kind in BAD_KINDS and bad_left == 0:
            continue
        placed = _place(dirt, f"{split}/{class_name}", free[split, class_name], free[tested, class_name])
        plan.update(placed)
        bad_left -= len(placed) if dirt.kind in BAD_KINDS else 0
    return plan


def _place(dirt: Dirt, folder: str, free: list[str], free_tested: list[str]) -> dict[str, Dirt]:
    """Takes the paths that `dirt` needs from those still free; empty if they do not suffice."""
    if dirt.kind == "text":
        return {f"{folder}/{dirt.variant}": dirt}
    if dirt.variant == "within":
        if len(free) < 2:
            return {}
        original, path = sorted((free.pop(), free.pop()))
        return {path: dirt._replace(original=original)}
    if dirt.kind in ("duplicate", "near_duplicate"):
        return {free.pop(): dirt._replace(original=free_tested.pop())} if free and free_tested else {}
    return {free.pop(): dirt} if free else {}


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


# --- Files.


def _encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _picture(path: str, name: str, seed: int) -> tuple[Image.Image, int]:
    """The picture that belongs at `path` and the JPEG quality that it is stored with."""
    rng = _generator(seed, name, path)
    return draw_object(path.split("/")[1], rng, CAMERAS[name]), int(rng.integers(60, 96))


def _jpeg_file(path: str, name: str, seed: int) -> bytes:
    image, quality = _picture(path, name, seed)
    return _encode(image, "JPEG", quality=quality)


def _dirty_file(dirt: Dirt, path: str, name: str, seed: int) -> bytes:
    if dirt.kind == "zero_byte":
        return b""
    if dirt.kind == "one_pixel":
        return _encode(Image.new("RGB", (1, 1), (128, 128, 128)), "JPEG")
    if dirt.kind == "text":
        return f"{name}/{path}: taken on several days, see the binder on the shelf.\n".encode()
    if dirt.kind == "duplicate":
        return _jpeg_file(dirt.original, name, seed)
    if dirt.kind == "near_duplicate":
        return _near_duplicate(*_picture(dirt.original, name, seed), dirt.variant)
    if dirt.kind == "truncated":
        data = _jpeg_file(path, name, seed)
        return data[: min(int(len(data) * float(dirt.variant)), len(data) - 2)]  # at least the end marker is gone
    return _unusual(dirt.kind, *_picture(path, name, seed))


def _near_duplicate(image: Image.Image, quality: int, variant: str) -> bytes:
    if variant == "brighter":
        image = image.point(lambda value: min(255, value + 4))
    elif variant == "darker":
        image = image.point(lambda value: max(0, value - 4))
    return _encode(image, "JPEG", quality=90 if quality < 80 else 70)


def _unusual(kind: str, image: Image.Image, quality: int) -> bytes:
    """The picture in a form that a careful pipeline accepts."""
    if kind == "png":
        return _encode(image, "PNG")
    if kind == "webp":
        return _encode(image, "WEBP", quality=quality)
    if kind == "cmyk":
        return _encode(image.convert("CMYK"), "JPEG", quality=quality)
    if kind == "grey":
        return _encode(image.convert("L"), "JPEG", quality=quality)
    if kind == "sixteen_bit":
        return _encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for showing, so it is stored turned the other way
    return _encode(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=quality, exif=exif)


# --- Shapes, in coordinates of the object: about -1 to 1, y downwards.

Points = np.ndarray  # float64 (n, 2)


class Shape(NamedTuple):
    """Outlines of an object: `body` has colour and texture, `holes` are cut out of it, `trim` is light or dark grey."""

    body: Sequence[Points]
    holes: Sequence[Points] = ()
    trim: Sequence[Points] = ()


def _polygon(*numbers: float) -> Points:
    return np.array(numbers, dtype=np.float64).reshape(-1, 2)


def _arc(x: float, y: float, width: float, height: float, start: float = 0, end: float = 360, n: int = 24) -> Points:
    """`n` points of an ellipse about (x, y) with half-axes `width`, `height`; degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, end, n))
    return np.stack([x + width * np.cos(angle), y + height * np.sin(angle)], axis=1)


_SCALLOPS = [_arc(x, 0.1, 0.2, 0.14, 0, -180, 8) for x in (0.8, 0.4, 0, -0.4, -0.8)]
# fmt: off
SHAPES = {
    "fish": Shape(
        body=(
            _arc(-0.2, 0, 0.75, 0.46),
            _polygon(0.4, 0, 1, -0.5, 0.85, 0, 1, 0.5),
            _polygon(-0.35, -0.4, 0.1, -0.75, 0.2, -0.35),
        ),
        trim=(_arc(-0.62, -0.1, 0.1, 0.1, n=10),),
    ),
    "house": Shape(
        body=(
            _polygon(-0.7, -0.1, 0.7, -0.1, 0.7, 0.85, -0.7, 0.85),
            _polygon(-0.95, -0.05, 0, -0.9, 0.95, -0.05),
            _polygon(0.35, -0.5, 0.35, -0.9, 0.6, -0.9, 0.6, -0.3),
        ),
        trim=(
            _polygon(-0.45, 0.3, -0.1, 0.3, -0.1, 0.85, -0.45, 0.85),
            _polygon(0.15, 0.2, 0.48, 0.2, 0.48, 0.5, 0.15, 0.5),
        ),
    ),
    "mug": Shape(
        body=(_arc(0.55, 0.05, 0.42, 0.45), _polygon(-0.75, -0.75, 0.5, -0.75, 0.45, 0.8, -0.7, 0.8)),
        holes=(_arc(0.62, 0.05, 0.2, 0.24),),
        trim=(_arc(-0.125, -0.75, 0.62, 0.13),),
    ),
    "mushroom": Shape(
        body=(np.concatenate([_arc(0, 0.05, 0.95, 0.85, 180, 360), _arc(0, 0.05, 0.95, 0.15, 0, 180)]),),
        trim=(_polygon(-0.22, 0.15, 0.22, 0.15, 0.34, 0.85, -0.34, 0.85),),
    ),
    "shirt": Shape(
        body=(
            _polygon(
                -0.35, -0.75, 0.35, -0.75, 1, -0.35, 0.75, 0.1, 0.5, -0.08,
                0.5, 0.85, -0.5, 0.85, -0.5, -0.08, -0.75, 0.1, -1, -0.35,
            ),
        ),
        holes=(_arc(0, -0.78, 0.22, 0.2),),
    ),
    "umbrella": Shape(
        body=(np.concatenate([_arc(0, 0.1, 1, 0.9, 180, 360), *_SCALLOPS]),),
        trim=(
            _polygon(-0.04, 0.05, 0.04, 0.05, 0.04, 0.8, -0.04, 0.8),
            _arc(0.12, 0.75, 0.16, 0.2, 0, 180, 8),
            _polygon(-0.03, -0.95, 0.03, -0.95, 0.03, -0.8, -0.03, -0.8),
        ),
    ),
}
# fmt: on
HUES = {"red": 0.99, "yellow": 0.14, "green": 0.36, "blue": 0.6}
TEXTURES = ("plain", "striped", "dotted", "checked")

# --- Drawing. How hard it is was tuned so that ResNet-18 at 64 px reaches about nine in ten after fine-tuning, no more.

ROTATION = 40  # degrees, either way
SCALE = (0.34, 0.48)  # half the object's extent, of the picture's shorter side
HUE_SPREAD = 0.03
DECOYS = 2  # at most
SCRAPS = 9  # at most
OCCLUDER = 0.4  # half its width at most, of half the object's extent
NOISE = 10  # half its range at most


class Camera(NamedTuple):
    """How a sample was taken: contrast about mid-grey, then a factor for each of red, green, blue."""

    contrast: float
    tint: tuple[float, float, float]


# The target comes from another camera, flatter and warmer, as new data mostly do: frozen features suffer, tuned ones
# hardly.
CAMERAS = {"upstream": Camera(1.0, (1.0, 1.0, 1.0)), "target": Camera(0.75, (1.06, 0.98, 0.86))}


class Frame(NamedTuple):
    """Where an object lies: pixel = matrix @ point + origin."""

    matrix: np.ndarray  # (2, 2)
    origin: np.ndarray  # (2,)

    def to_pixels(self, outlines: Sequence[Points]) -> list[Points]:
        return [points @ self.matrix.T + self.origin for points in outlines]


def _frame(x: float, y: float, scale: float, angle: float, flip: float = 1, stretch: float = 1) -> Frame:
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    return Frame(np.array([[cos * flip * stretch, -sin], [sin * flip * stretch, cos]]), np.array([x, y]))


class Box(NamedTuple):
    """Part of a canvas, in whole pixels; never empty."""

    left: int
    top: int
    right: int
    bottom: int

    def of(self, canvas: np.ndarray) -> np.ndarray:
        return canvas[self.top : self.bottom, self.left : self.right]


def _box_around(outlines: Sequence[Points], canvas: np.ndarray) -> Box:
    height, width = canvas.shape[:2]
    points = np.concatenate(outlines)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0) + 1
    left, top = max(0, min(width - 1, int(left))), max(0, min(height - 1, int(top)))
    return Box(left, top, max(left, min(width - 1, int(right))) + 1, max(top, min(height - 1, int(bottom))) + 1)


def _coverage(box: Box, *layers: tuple[Sequence[Points], int]) -> np.ndarray:
    """How far outlines cover each pixel of `box`, float32 (h, w, 1), 0-1: drawn at twice the size for smooth edges."""
    mask = Image.new("L", ((box.right - box.left) * 2, (box.bottom - box.top) * 2))
    pen = ImageDraw.Draw(mask)
    for outlines, value in layers:
        for points in outlines:
            pen.polygon(((points - (box.left, box.top)) * 2).ravel().tolist(), fill=value)
    return np.asarray(mask.reduce(2), dtype=np.float32)[..., None] * np.float32(1 / 255)


def _lay(part: np.ndarray, coverage: np.ndarray, colour: np.ndarray | np.float32) -> None:
    """Lays `colour` over `part` (h, w, 3) of a canvas, in place."""
    part += coverage * (colour - part)


def _colour(rng: np.random.Generator, hue: float) -> np.ndarray:
    """An RGB colour, float32 (3,), 0-255, of about `hue` (0-1)."""
    saturation, value = rng.uniform(0.6, 0.95), rng.uniform(0.55, 0.95)
    sector = (np.array([5.0, 3.0, 1.0]) + (hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) * 6) % 6
    return (255 * value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))).astype(np.float32)


def _pattern(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much of the second tone shows, 0-1, at phases `u` and `v` (radians) along and across the object."""
    if texture == "striped":
        return np.clip(np.sin(u) * 3 + 0.5, 0, 1) + 0 * v
    if texture == "dotted":
        return np.clip((np.cos(u) + np.cos(v) - 0.7) * 3, 0, 1)
    return np.clip(np.sin(u) * np.sin(v) * 6 + 0.5, 0, 1)


def _surface(rng: np.random.Generator, box: Box, frame: Frame, hue: float, texture: str, pitch: float) -> np.ndarray:
    """Colours of a textured surface, float32 (h, w, 3) or (3,); `pitch`: half periods per half extent of the object."""
    first = _colour(rng, hue)
    second = first * np.float32(0.35) if rng.random() < 0.5 else 255 - (255 - first) * np.float32(0.25)
    if texture == "plain":
        return first
    inverse = (np.linalg.inv(frame.matrix) * np.pi * pitch).astype(np.float32)
    x = np.arange(box.left, box.right, dtype=np.float32) - np.float32(frame.origin[0])
    y = (np.arange(box.top, box.bottom, dtype=np.float32) - np.float32(frame.origin[1]))[:, None]
    share = _pattern(texture, inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y)
    return first + share[..., None] * (second - first)


def draw_object(class_name: str, rng: np.random.Generator, camera: Camera) -> Image.Image:
    """An RGB picture of one object of class `<shape>_<colour>_<texture>`; shorter side 72-124 px, longer up to 160."""
    shape, colour, texture = class_name.split("_")
    shorter = int(rng.integers(72, 125))
    longer = min(160, int(shorter * rng.uniform(1, 1.5)))
    width, height = (longer, shorter) if rng.random() < 0.6 else (shorter, longer)
    canvas = _ground(rng, width, height)
    for _ in range(int(rng.integers(DECOYS + 1))):
        _draw_decoy(rng, canvas, shorter)
    scale = rng.uniform(*SCALE) * shorter
    x, y = (rng.uniform(0.9 * scale, side - 0.9 * scale) for side in (width, height))
    angle = np.radians(rng.uniform(-ROTATION, ROTATION))
    frame = _frame(x, y, scale, angle, flip=rng.choice([-1, 1]), stretch=rng.uniform(0.8, 1.2))
    _draw_shape(rng, canvas, SHAPES[shape], frame, HUES[colour], texture)
    _draw_occluder(rng, canvas, frame, scale)
    canvas *= _light(rng, width, height)
    canvas = ((canvas - 110) * np.float32(camera.contrast) + 110) * np.array(camera.tint, dtype=np.float32)
    noise = rng.integers(-128, 128, (height, width, 1), dtype=np.int8)
    canvas += noise * np.float32(rng.uniform(0, NOISE) / 128)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _ground(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A mottled ground with scraps on it: the canvas, float32 (height, width, 3), 0-255."""
    rows, columns = rng.integers(3, 9, 2)
    spots = np.clip(rng.uniform(50, 200, 3) + rng.uniform(-45, 45, (rows, columns, 3)), 0, 255)
    ground = Image.fromarray(spots.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(ground)
    for _ in range(int(rng.integers(SCRAPS // 2, SCRAPS + 1))):
        x, y, dx, dy, thick = rng.uniform((0, 0, -0.5, -0.5, 0.02), (1, 1, 0.5, 0.5, 0.12)) * width
        y *= height / width
        tone = tuple(rng.integers(20, 235, 3).tolist())
        if rng.random() < 0.4:
            pen.ellipse((x - thick, y - thick, x + thick, y + thick), fill=tone)
        else:
            pen.line((x, y, x + dx, y + dy), fill=tone, width=max(1, int(thick)))
    return np.array(ground, dtype=np.float32)


def _draw_decoy(rng: np.random.Generator, canvas: np.ndarray, shorter: float) -> None:
    """A patch in an object's colour and texture, but of no object's shape: these two alone must not tell the class."""
    scale = rng.uniform(0.12, 0.28) * shorter
    frame = _frame(rng.uniform(0, canvas.shape[1]), rng.uniform(0, canvas.shape[0]), scale, rng.uniform(0, 6.3))
    angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
    outline = frame.to_pixels([np.stack([np.cos(angles), np.sin(angles)], axis=1)])
    box = _box_around(outline, canvas)
    hue, texture = rng.choice(list(HUES.values())), str(rng.choice(TEXTURES))
    surface = _surface(rng, box, frame, hue, texture, pitch=rng.uniform(6, 9) * scale / shorter)
    _lay(box.of(canvas), _coverage(box, (outline, 255)), surface)


def _draw_shape(
    rng: np.random.Generator, canvas: np.ndarray, shape: Shape, frame: Frame, hue: float, texture: str
) -> None:
    body, holes, trim = map(frame.to_pixels, shape)
    shadow = [points + 3 for points in body + trim]
    box = _box_around(shadow, canvas)
    box.of(canvas)[...] *= 1 - np.float32(0.35) * _coverage(box, (shadow, 255))
    box = _box_around(body + trim, canvas)
    surface = _surface(rng, box, frame, hue, texture, pitch=rng.uniform(2.2, 3.2))
    _lay(box.of(canvas), _coverage(box, (body, 255), (holes, 0)), surface)
    if trim:
        tone = np.float32(rng.uniform(200, 240) if rng.random() < 0.5 else rng.uniform(25, 60))
        _lay(box.of(canvas), _coverage(box, (trim, 255)), tone)


def _draw_occluder(rng: np.random.Generator, canvas: np.ndarray, frame: Frame, scale: float) -> None:
    """A bar or a patch of any colour over a part of the object."""
    angle, distance = rng.uniform(0, 6.3), rng.uniform(0.3, 1) * scale
    middle = frame.origin + distance * np.array([np.cos(angle), np.sin(angle)])
    wide = rng.uniform(0.3, 1) * OCCLUDER * scale / 1.6
    long = wide * (4 if rng.random() < 0.5 else 1.2)
    corners = _polygon(-long, -wide, long, -wide, long, wide, -long, wide)
    outline = _frame(middle[0], middle[1], 1, rng.uniform(0, 6.3)).to_pixels([corners])
    box = _box_around(outline, canvas)
    _lay(box.of(canvas), _coverage(box, (outline, 255)), rng.uniform(20, 235, 3).astype(np.float32))


def _light(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Uneven light, float32 (height, width, 1), about 1: it falls off in one direction."""
    angle, fall = rng.uniform(0, 6.3), rng.uniform(0.1, 0.6)
    x = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(np.cos(angle) * fall)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(np.sin(angle) * fall)
    return ((1 + x + y) * np.float32(rng.uniform(0.75, 1.1)))[..., None]
