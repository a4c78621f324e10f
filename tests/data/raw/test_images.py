"""What an image is: the quick way says what Pillow says, and no image is more work than a picture needs."""

import base64
import io
import struct
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from stages.data.parallel import crash_safe_pool
from stages.data.raw import images
from stages.data.raw.images import (
    MAX_PIXELS,
    Header,
    brightness_and_contrast,
    decode_strictly,
    difference_hash,
    read_header,
    to_rgb,
    upright_pixels,
)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """An image in a format."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def scene(width: int = 160, height: int = 120) -> Image.Image:
    """A picture with structure."""
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def segments(data: bytes | bytearray) -> list[tuple[int, int]]:
    """Marker and offset of each segment of a JPEG."""
    found, at = [], 2
    while at < len(data):
        if data[at] == 0xFF and data[at + 1] not in (0, *range(0xD0, 0xD8)):
            found.append((data[at + 1], at))
            at += 2 + (0 if data[at + 1] == 0xD9 else int.from_bytes(data[at + 2 : at + 4], "big"))
        else:
            at += 1
    return found


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (encoded(scene()), True),
        (encoded(scene().convert("L")), True),
        (encoded(scene().convert("CMYK")), True),
        (encoded(scene(), comment=b"\xff\xda\xff\xe1", icc_profile=b"\xff\xd8" * 9, subsampling="4:4:4"), True),
        (encoded(scene(), restart_marker_blocks=3, optimize=True), True),
        (encoded(scene(), progressive=True), False),
        (encoded(scene(), exif=turned(6)), False),
        (encoded(scene(), icc_profile=b"\xff\xda" * 500, exif=turned(3)), False),
        (encoded(scene(), xmp=b'<x tiff:Orientation="8"/>'), False),
        (encoded(scene(), "PNG"), False),
        (encoded(scene())[:300], False),
        (encoded(scene())[:2], False),
        (b"", False),
    ],
)
def test_plain_headers_are_read_as_pillow_reads_them(data: bytes, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(data)
    assert header.plain == plain
    monkeypatch.setattr(images, "_plain_jpeg_header", lambda _: None)
    assert read_header(data) == header._replace(plain=False)


def test_every_cut_of_every_kind_is_refused() -> None:
    """At every byte; of a PNG's last chunk, which holds nothing, the checksum may be missing."""
    small = scene(40, 30)
    for data in (encoded(small), encoded(small, progressive=True), encoded(small, "PNG")):
        for kept in range(len(data) - (4 if data[:1] == b"\x89" else 0)):
            with pytest.raises(ValueError, match=r".+"):
                decode_strictly(data[:kept], read_header(data[:kept]))


# 48x40, a ramp in each colour; colour at a quarter of the columns and half of the rows (cjpeg -sample 4x2), which
# Pillow and simplejpeg cannot write.
ODDLY_SAMPLED = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
    "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT0//wAARCAAoADADAUIAAhEBAxEB/8QAGAABAQEBAQAAAAAAAAAAAAAABAADBQf/xAAXEAADAQAAAAAAAAAAAAAAAAAA"
    "A2EC/8QAFgEBAQEAAAAAAAAAAAAAAAAABgIE/8QAGhEAAgMBAQAAAAAAAAAAAAAAAAECAwQSIv/aAAwDAQACEQMRAD8A88WiCMIg"
    "nCIIwiGC0QThEEYRBOEQhTNOO8LhEELRCIVhEErRCIvsS03+TjrRBGEQThEEYRDBaIJwiCMIgnCIY1MBY7wuEQQtEIhWEQStEIi1"
    "MS03+TjrRBGEQThEEYRCIiMqYFxzYnCIIWiERERFJiWmb5P/2Q=="
)


def test_a_jpeg_with_unusual_subsampling_is_a_picture_like_others() -> None:
    header = read_header(ODDLY_SAMPLED)
    assert (header.format, header.width, header.height, header.plain) == ("JPEG", 48, 40, True)
    rows, columns = np.mgrid[:40, :48]
    ramps = np.stack([columns * 5, rows * 6, (rows + columns) * 2], axis=-1)
    with Image.open(io.BytesIO(ODDLY_SAMPLED)) as image:
        grey = np.asarray(image.convert("L"))
    assert np.array_equal(decode_strictly(ODDLY_SAMPLED, header), grey)
    pixels, as_it_is = upright_pixels(ODDLY_SAMPLED)
    assert not as_it_is  # its encoding is not one that every decoder takes
    assert np.abs(pixels - ramps).mean() < 8
    with pytest.raises(ValueError, match="truncated"):
        decode_strictly(ODDLY_SAMPLED[:-20], header)


def tiff_in_strips(strips: int, order: str) -> bytes:
    """A grey column of pixels, each a strip of its own (TIFF 6.0, section 2)."""
    tags = {256: 1, 257: strips, 258: 8, 259: 1, 262: 1, 273: None, 277: 1, 278: 1, 279: None}
    offsets_at = 8 + 2 + 12 * len(tags) + 4
    lengths_at, pixels_at = offsets_at + 4 * strips, offsets_at + 8 * strips
    out = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    for tag, value in tags.items():
        place = offsets_at if tag == 273 else lengths_at
        out += struct.pack(order + "HHII", tag, 4, *((strips, place) if value is None else (1, value)))
    numbers = np.concatenate([pixels_at + np.arange(strips), np.ones(strips, int)])
    return out + bytes(4) + numbers.astype(order + "u4").tobytes() + bytes(range(256)) * (strips // 256)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_in_more_strips_than_any_picture_has_is_not_opened(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (tiff_in_strips(strips, order) for strips in (512, images.MAX_STRIPS + 256))
    assert decode_strictly(few, read_header(few)).shape == (512, 1)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"a TIFF in \d+ strips is more work"):
        decode_strictly(many, read_header(many))


def png_bomb() -> bytes:
    """All of 60,000 x 60,000 pixels, in half a megabyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate = zlib.compressobj(9)
    row = b"\0" * (60_000 // 8 + 1)
    pixels = b"".join(deflate.compress(row) for _ in range(60_000)) + deflate.flush()
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_bomb(**options: Any) -> bytes:
    """A JPEG whose frame claims 60,000 x 60,000 pixels."""
    data = bytearray(encoded(scene(), **options))
    (at,) = [at for marker, at in segments(data) if marker in (0xC0, 0xC2)]
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def gif_bomb() -> bytes:
    """A GIF whose first picture claims 60,000 x 60,000 pixels."""
    data = bytearray(encoded(scene(), "GIF"))
    at = data.rindex(b",\0\0\0\0" + struct.pack("<HH", 160, 120))
    data[at + 5 : at + 9] = data[6:10] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


@pytest.mark.parametrize(
    "bomb", [png_bomb, jpeg_bomb, lambda: jpeg_bomb(progressive=True), gif_bomb], ids=["png", "jpeg", "prog", "gif"]
)
def test_bombs_are_known_by_their_header(bomb: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_safe_pool, "MOST_MEMORY", 2**28)
    data = bomb()
    ((_, header),) = crash_safe_pool.run_tasks(lambda data, _: read_header(data), deque([data]), 1)
    assert isinstance(header, Header)
    assert (header.width, header.height) == (60_000, 60_000)
    with pytest.raises(ValueError, match=f"60000x60000 is more than {MAX_PIXELS} pixels"):
        decode_strictly(data, header)


def test_a_jpeg_of_endless_scans_is_not_decoded() -> None:
    data = encoded(scene(1200, 900), progressive=True)
    assert decode_strictly(data, read_header(data)).shape == (113, 150)
    scan = [at for marker, at in segments(data) if marker == 0xDA][-1]
    endless = data[:-2] + data[scan:-2] * 10_000 + data[-2:]
    with pytest.raises(ValueError, match=r"1200x900 in 1001\d scans is more work"):
        decode_strictly(endless, read_header(endless))


def test_a_side_that_facts_have_no_room_for_is_cut() -> None:
    tiff = encoded(scene(), "TIFF")
    huge = tiff.replace(struct.pack("<HHII", 0x0100, 4, 1, 160), struct.pack("<HHII", 0x0100, 4, 1, 0xFFFFFFFF))
    assert huge != tiff
    assert read_header(huge) == Header("TIFF", 2**31 - 1, 120, "RGB")
    with pytest.raises(ValueError, match="2147483647x120 is more than"):
        decode_strictly(huge, read_header(huge))


def test_brightness_and_contrast_are_numpys() -> None:
    for side in (1, 7, 64, 300):
        luminance = np.random.default_rng(side).integers(0, 256, (side, side + 3), dtype=np.uint8)
        mean, deviation = brightness_and_contrast(luminance)
        assert np.float32(mean) == np.float32(luminance.mean())
        assert np.float32(deviation) == np.float32(luminance.std())


def test_the_hash_says_where_it_gets_brighter_to_the_right() -> None:
    row = np.array([0, 30, 20, 40, 40, 50, 10, 9, 200], np.uint8)  # brighter, darker, brighter, same, ...
    luminance = np.kron(np.tile(row, (8, 1)), np.ones((6, 5), np.uint8))
    assert difference_hash(luminance) == int("10101001" * 8, 2)
    assert difference_hash(np.full((50, 40), 7, np.uint8)) == 0


def icon(mode: str) -> Image.Image:
    """A black square on transparent black."""
    image = Image.new("LA", (48, 48), (0, 0))
    image.paste((0, 255), (16, 16, 32, 32))
    return image.convert(mode)


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with a chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png[:33] + chunk + png[33:]


TRANSPARENT = {
    "RGBA PNG": encoded(icon("RGBA"), "PNG"),
    "LA PNG": encoded(icon("LA"), "PNG"),
    "RGBA TIFF": encoded(icon("RGBA"), "TIFF"),
    "WebP": encoded(icon("RGBA"), "WEBP", lossless=True),
    "GIF": encoded(icon("RGBA"), "GIF"),
    "key colour": encoded(Image.eval(icon("LA").getchannel("A"), lambda level: 255 - level), "PNG", transparency=255),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_are_white(kind: str) -> None:
    """Where pixels are read and where they are measured."""
    data = TRANSPARENT[kind]
    expected = np.full((48, 48), 255)
    expected[16:32, 16:32] = 0
    assert np.array_equal(np.asarray(to_rgb(data)), np.stack([expected] * 3, axis=-1))
    assert np.array_equal(decode_strictly(data, read_header(data)), expected)


def test_a_key_colour_of_16_bits_is_transparent() -> None:
    data = with_chunk(encoded(ramp(16), "PNG"), b"tRNS", b"\0\0")
    grey = np.asarray(to_rgb(data).convert("L"))
    assert grey[0, 0] == 255
    assert np.array_equal(grey.ravel()[1:], np.asarray(ramp(16)).ravel()[1:] >> 8)
    assert np.array_equal(decode_strictly(data, read_header(data)), grey)


def test_an_opaque_alpha_changes_nothing() -> None:
    assert np.array_equal(np.asarray(to_rgb(encoded(scene().convert("RGBA"), "PNG"))), np.asarray(scene()))


def ramp(bits: int, dtype: str = "<u2") -> Image.Image:
    return Image.fromarray(np.linspace(0, 2**bits - 1, 4096).astype(dtype).reshape(64, 64))


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_few_bits_in_16_are_refused_where_nothing_says_what_is_white(bits: int, form: str) -> None:
    data = encoded(ramp(bits), form)
    for read in (to_rgb, lambda data: decode_strictly(data, read_header(data))):
        with pytest.raises(ValueError, match=f"use only {bits} bits"):
            read(data)


@pytest.mark.parametrize("bits", [4, 10, 12, 14, 16])
def test_a_png_says_how_many_bits_it_uses(bits: int) -> None:
    data = with_chunk(encoded(ramp(bits), "PNG"), b"sBIT", bytes([bits]))
    grey = np.asarray(to_rgb(data).convert("L"))
    assert grey.max() == 256 - 2 ** max(0, 8 - bits)
    assert np.array_equal(decode_strictly(data, read_header(data)), grey)


def test_samples_scaled_to_16_bits_are_read_as_such_whatever_sbit_says() -> None:
    data = with_chunk(encoded(ramp(16), "PNG"), b"sBIT", b"\x0c")
    assert np.array_equal(np.asarray(to_rgb(data)), np.asarray(to_rgb(encoded(ramp(16), "PNG"))))


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (ramp(0, "<f4"), "floating-point"),
        (ramp(20, "<i4"), "beyond 16 bits"),
        (Image.fromarray(np.full((40, 40), -5, "<i4")), "beyond 16 bits"),
    ],
)
def test_numbers_of_no_known_range_are_refused(image: Image.Image, why: str) -> None:
    data = encoded(image, "TIFF")
    for read in (to_rgb, lambda data: decode_strictly(data, read_header(data))):
        with pytest.raises(ValueError, match=why):
            read(data)


def test_measuring_is_not_stricter_than_reading() -> None:
    data = encoded(Image.merge("LAB", scene().split()), "TIFF")
    assert np.array_equal(decode_strictly(data, read_header(data)), np.asarray(to_rgb(data).convert("L")))


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_12_bits_in_16_are_refused_and_those_of_16_read(channels: int) -> None:
    levels = np.random.default_rng(1).integers(0, 2**16, (40, 40, channels)).astype(np.uint16)
    levels[:, :, 3:] = 2**16 - 1  # opaque
    few, full = (cv2.imencode(".png", each)[1].tobytes() for each in (levels & np.uint16(2**12 - 1), levels))
    assert np.array_equal(np.asarray(to_rgb(full)), levels[:, :, 2::-1] >> 8)
    with pytest.raises(ValueError, match="use only 12 bits"):
        to_rgb(few)


def colour_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits: pixels (H, W, C), written by OpenCV, which takes blue first."""
    return cv2.imencode(".png", pixels.astype(np.uint16))[1].tobytes()


@pytest.mark.parametrize("bits", [6, 8, 12])
def test_colours_of_sixteen_bits_that_use_few_are_refused(bits: int) -> None:
    data = colour_png(np.random.default_rng(1).integers(0, 1 << bits, (40, 40, 3)))
    with pytest.raises(ValueError, match=r"use only \d+ bits"):
        decode_strictly(data, read_header(data))


def test_a_black_icon_of_sixteen_bits_is_seen() -> None:
    pixels = np.zeros((40, 40, 4))
    pixels[10:30, 10:30, 3] = 65535
    found = np.asarray(to_rgb(colour_png(pixels)))
    assert found[20, 20].tolist() == [0, 0, 0] and found[0, 0].tolist() == [255, 255, 255]
