"""From bytes as they came to pixels: what an image is, and its conversion to upright 8-bit RGB."""

import io
import math
import struct
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, TiffImagePlugin

from stages.data.raw.jpeg_warnings import mended

# Above this nothing is decoded: a decompression bomb must not take the machine down (PIL's own limit).
MAX_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = None

# The formats that are recognised, a closed list: some of PIL's plugins start other programs (EPS).
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]

SOURCE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Suffixes of image files, in lower case. They tell layouts of sources apart; whether a file is an image is told by its
content. A longer list would read sources otherwise that were read before."""
IMAGE_SUFFIXES = (*SOURCE_SUFFIXES, ".jpe", ".jfif", ".gif", ".tif", ".tiff")
"""What `predict` takes from folders and tars."""

# Pillow raises these at damaged images; some of its decoders only pass on that Python cannot go on.
_EXPECTED = (OSError, SyntaxError, EOFError, ValueError)
DAMAGED = (*_EXPECTED, ArithmeticError, LookupError, TypeError, AttributeError, struct.error, MemoryError)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation."""

BACKGROUND = (255, 255, 255, 255)
"""What transparent pixels show: white, as on a page. Part of what a model learns, so serving repeats it."""

LEAST_WHITE = 2**14
"""16-bit grey whose largest value is below is rather of 10, 12 or 14 bits than of a very dark scene."""

# The work is bounded too: a progressive JPEG may paint the same pixels in thousands of scans of a few bytes each.
# Pixels times scans; those of the largest image in 48 scans (cameras and encoders write about ten), some seconds.
MAX_SCANNED = 2**33
# A scan costs something however small the image is.
LEAST_SCAN = 2**20

# A strip of a TIFF costs something too. A hostile file has millions, ordinary ones have at most one per row.
MAX_STRIPS = 2**17

# A thumbnail with its shorter side at least this long is enough for hash, brightness and contrast.
THUMBNAIL_SIDE = 32

# A TIFF may claim more, which facts have no room for.
LONGEST_SIDE = 2**31 - 1

SEGMENT = ">BBH"  # FF, marker, length without the two
FRAME = ">BHHB"  # bits, height, width, components
BASELINE = (0xC0, 0xC1)
START_OF_SCAN = 0xDA
SKIPPED = frozenset([0xDB, 0xC4, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)])
"""JPEG segments that say nothing of size, mode or orientation: tables, comments, all APPn but EXIF and XMP."""
BIG_TIFF = 43
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
"""By the number of components."""


class Header(NamedTuple):
    """What the first bytes say. `format` is empty where they are of no known image."""

    format: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    orientation: int = 1
    plain: bool = False
    """A JPEG in one scan and without EXIF or XMP, as most are."""


MOST_MENDS = 4
"""Harmless oddities of one JPEG; it is decoded again after each."""


def read_header(data: bytes) -> Header:
    """By magic number, never by name; an unknown format or a broken header gives the empty one."""
    if plain := _plain_jpeg_header(data):
        return plain
    if _tiff_strips(data) > MAX_STRIPS:
        return Header("TIFF")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return Header(
                # Cameras' multi-picture files are JPEGs with more behind the first one.
                format="JPEG" if image.format == "MPO" else image.format or "",
                width=min(image.width, LONGEST_SIDE),
                height=min(image.height, LONGEST_SIDE),
                mode=image.mode,
                orientation=_orientation(image),
            )
    except DAMAGED:
        return Header()


def decode_strictly(data: bytes, header: Header, side: int = THUMBNAIL_SIDE) -> np.ndarray:
    """Luminance thumbnail (H, W), uint8, orientation not applied, of an image that decodes to its last byte.

    JPEGs are decoded at the smallest scale that keeps both sides from `side` pixels on: it reads the whole stream, so
    it finds every truncation, at a fraction of the cost of all pixels.

    Raises:
        ValueError: the image is damaged, is none, or has more than `MAX_PIXELS`; the message says which.
    """
    if not header.format:
        raise ValueError("empty file" if not data else "not an image")
    if header.width * header.height > MAX_PIXELS:
        raise ValueError(f"{header.width}x{header.height} is more than {MAX_PIXELS} pixels")
    if (strips := _tiff_strips(data)) > MAX_STRIPS:
        raise ValueError(f"a TIFF in {strips} strips is more work than any picture needs")
    if header.format == "JPEG":
        _refuse_endless_scans(data, header)
        luminance = _whole_jpeg(data, side)
        if luminance is not None:
            return luminance[:, :, 0]
    try:
        # Checksums of all chunks of a PNG (decoding stops at the last pixel); a verified image must be opened anew.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.verify()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode == "LAB" or image.has_transparency_data:
                return np.asarray(_on_background(image, data).convert("L"))
            return np.asarray(_eight_bit(image, data).convert("L"))
    except DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from error


def difference_hash(luminance: np.ndarray) -> int:
    """64-bit difference hash (Krawetz 2013): which cells of a 9x8 thumbnail are darker than the one to the right.

    Args:
        luminance: (H, W), uint8.
    """
    cells = cv2.resize(luminance, (9, 8), interpolation=cv2.INTER_AREA)
    return int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes(), "big")


def brightness_and_contrast(luminance: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all pixels. OpenCV adds up whole numbers, in a tenth of NumPy's time.

    Args:
        luminance: (H, W), uint8.
    """
    mean, deviation = cv2.meanStdDev(luminance)
    return float(mean[0, 0]), float(deviation[0, 0])


def to_rgb(data: bytes) -> Image.Image:
    """The image upright, 8 bits, RGB. CMYK, grey, palette and 16-bit are converted; transparent pixels are white.

    Raises:
        ValueError: what stands for white in it is not known.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return _on_background(_upright(image), data)


def upright_pixels(data: bytes) -> tuple[np.ndarray, bool]:
    """Pixels as `to_rgb` has them, (H, W, 3) uint8; and whether the bytes are a baseline RGB JPEG without orientation.

    Every decoder reads such a JPEG as it is. This is not strict, as scan has judged the bytes.
    """
    if (plain := _plain_jpeg_header(data)) and plain.mode in ("RGB", "L"):
        fast, baseline = True, plain.mode == "RGB"
    else:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            fast = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and orientation not in TURNS
            baseline = image.mode == "RGB" and not image.info.get("progressive") and orientation == 1
    pixels = _fast_decode(data, "RGB", strict=False) if fast else None
    return (np.asarray(to_rgb(data)), False) if pixels is None else (pixels, baseline)


def resize_shorter(pixels: np.ndarray, side: int) -> np.ndarray:
    """The image with its shorter side at `side` pixels; smaller ones are left as they are.

    Bicubic to the next whole multiple of the new size, which is then averaged: 43 dB from Lanczos where 500x375
    becomes 341x256, as a JPEG within 0.3 dB of PIL's antialiased bicubic, in a fourth of its time (`python -m
    bench.sharding`). `INTER_AREA` alone takes twice as long, to 39 dB.

    Args:
        pixels: (H, W, 3), uint8.
    """
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter <= side:
        return pixels
    width, height = (max(side, round(length * side / shorter)) for length in (width, height))
    times = max(2, math.ceil(shorter / side))
    finer = cv2.resize(pixels, (width * times, height * times), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(finer, (width, height), interpolation=cv2.INTER_AREA)


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Baseline JPEG of RGB pixels (H, W, 3), 4:2:0, without metadata."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")


def _fast_decode(data: bytes, colourspace: str, **options: Any) -> np.ndarray | None:
    """A JPEG by libjpeg-turbo's simple interface; None where colour is subsampled in a way that it has no name for.

    Pillow decodes such a one. It notices a stream that ends too early, but not all damage.
    """
    try:
        return simplejpeg.decode_jpeg(data, colourspace, **options)
    except ValueError as error:
        if "Could not determine subsampling" in str(error):
            return None
        raise


def _whole_jpeg(data: bytes, side: int) -> np.ndarray | None:
    """A JPEG scaled to sides from `side` pixels on, as `_fast_decode` gives it; warnings of libjpeg must be harmless.

    Raises:
        ValueError: pixels are missing or wrong.
    """
    options = {"fastdct": True, "fastupsample": True, "min_height": side, "min_width": side}
    for _ in range(MOST_MENDS):
        try:
            return _fast_decode(data, "GRAY", strict=True, **options)
        except ValueError as error:
            if (without := mended(data, str(error))) is None:
                raise
            data = without
    raise ValueError(f"libjpeg still warns after {MOST_MENDS} harmless oddities")


def _plain_jpeg_header(data: bytes) -> Header | None:
    """The header of a JPEG as most are, at a tenth of Pillow's price; None where anything is out of the ordinary.

    Marker segments as in ITU-T T.81, B.1: `FF`, marker, two bytes of length. Ordinary is one 8-bit Huffman-coded frame
    of 1, 3 or 4 components in one scan, and no APP1 (EXIF, XMP), which may tell an orientation.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, frame = 2, None
    try:
        while True:
            prefix, marker, length = struct.unpack_from(SEGMENT, data, at)
            if prefix != 0xFF or length < 2:
                return None
            if marker in BASELINE and frame is None:
                frame = struct.unpack_from(FRAME, data, at + 4)
            elif marker == START_OF_SCAN:
                return _plain(frame, data[at + 4])
            elif marker not in SKIPPED:
                return None
            at += 2 + length
    except (struct.error, IndexError):
        return None  # it ends too early


def _orientation(image: Image.Image) -> int:
    # Pillow decodes a PNG to get at its EXIF, which may come after the pixels: a bomb must not even be asked.
    if image.width * image.height > MAX_PIXELS:
        return 1
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def _plain(frame: tuple[int, ...] | None, scanned: int) -> Header | None:
    bits, height, width, components = frame or (0, 0, 0, 0)
    if bits != 8 or components != scanned or components not in MODES or not height or not width:
        return None
    return Header("JPEG", width, height, MODES[components], plain=True)


def _refuse_endless_scans(data: bytes, header: Header) -> None:
    # Within a scan FF is always followed by 00, so this counts scans, and at most a few bytes of metadata.
    scans = 1 if header.plain else data.count(b"\xff\xda")
    if scans * max(header.width * header.height, LEAST_SCAN) > MAX_SCANNED:
        raise ValueError(f"{header.width}x{header.height} in {scans} scans is more work than any picture needs")


def _tiff_strips(data: bytes) -> int:
    """Strips or tiles of a TIFF, read as Pillow reads its directory; 0 of all else."""
    if data[:4] not in TiffImagePlugin.PREFIXES:
        return 0
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2] == BIG_TIFF else 8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        tags = (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS)
        return max(np.size(directory.get(tag, ())) for tag in tags)
    except DAMAGED:
        return 0  # Pillow will not open it either


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its orientation says. Pillow's own function writes all other EXIF tags anew, and fails on odd ones."""
    image.load()  # turns a TIFF, which then has no orientation any more
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image, data: bytes) -> Image.Image:
    """16-bit grey keeps its 8 highest bits: PIL's own conversion would clip everything above 255 to white.

    Raises:
        ValueError: what stands for white is not known.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of no known range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        if data[:4] == b"\x89PNG" and data[24] == 16:  # Pillow has kept the high bytes
            colours = image.convert(image.mode.rstrip("Aa") or image.mode).getextrema()
            _refuse_few_bits(int(np.max(colours)) << 8)
        return image
    pixels = np.asarray(image).astype(np.int64)
    low, high = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
    if low < 0 or high >> 16:
        raise ValueError(f"pixels from {low} to {high} are beyond 16 bits; save it with 8 or 16 bits")
    bits = _significant_bits(data)
    if not bits or high >> bits:  # samples are scaled to 16 bits, as the specification wants it
        bits = 16
        _refuse_few_bits(high)
    return Image.fromarray((pixels << 8 >> bits).astype(np.uint8))


def _refuse_few_bits(high: int) -> None:
    if 0 < high < LEAST_WHITE:
        raise ValueError(
            f"16-bit pixels use only {high.bit_length()} bits and nothing says what is white: they would come out "
            "nearly black; save it with 8 bits, or scaled to 16"
        )


def _significant_bits(data: bytes) -> int:
    """Of a grey PNG, as its chunk sBIT says (PNG specification, 11.3.2.3); 0 where there is none."""
    at = 8
    while data[:4] == b"\x89PNG" and (name := data[at + 4 : at + 8]) not in (b"", b"IDAT"):
        length = int.from_bytes(data[at : at + 4], "big")
        if name == b"sBIT":
            return data[at + 8] if length == 1 and data[at + 8] <= 16 else 0
        at += 12 + length
    return 0


def _on_background(image: Image.Image, data: bytes) -> Image.Image:
    """8-bit RGB; what is transparent shows `BACKGROUND`."""
    key = image.info.get("transparency") if image.mode.startswith("I") else None
    opaque = None if key is None else Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    image = _eight_bit(image, data)
    if opaque is not None:
        image.putalpha(opaque)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    ground = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
