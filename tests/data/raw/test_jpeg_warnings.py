"""What libjpeg warns of: damage is refused, what is only odd is read as every viewer reads it."""

import io
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from stages.data.raw.images import decode_strictly, read_header, upright_pixels
from stages.data.raw.jpeg_warnings import first_warning

END = b"\xff\xd9"


def jpeg(seed: int = 1, size: tuple[int, int] = (200, 160), **options: object) -> bytes:
    """Of smooth random colours with some grain, as photographs have it."""
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 3))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(cells) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def luminance(data: bytes) -> np.ndarray:
    """As scan measures it."""
    return decode_strictly(data, read_header(data))


PLAIN, PROGRESSIVE = jpeg(quality=85), jpeg(quality=85, progressive=True)
SCAN = PLAIN.index(b"\xff\xda")
SPARE = {
    "a drone's": bytes(range(1, 201)) * 2,
    "zeros": bytes(64),
    "text": b"MAKER NOTE " * 30,
    "few": b"abcdefghijkl",
    "a restart": b"abc\xff\xd0abcdefghijk",
}


@pytest.mark.parametrize("spare", SPARE.values(), ids=list(SPARE))
def test_bytes_to_spare_before_the_end_are_no_damage(spare: bytes) -> None:
    odd = PLAIN[:-2] + spare + END
    assert np.array_equal(luminance(odd), luminance(PLAIN))
    assert np.array_equal(upright_pixels(odd)[0], upright_pixels(PLAIN)[0])


@pytest.mark.parametrize("spare", [SPARE["a drone's"], SPARE["zeros"]])
def test_nor_are_they_in_a_progressive_one(spare: bytes) -> None:
    assert np.array_equal(luminance(PROGRESSIVE[:-2] + spare + END), luminance(PROGRESSIVE))


def set_sos(data: bytes) -> bytes:
    """Other spectral bounds than a sequential scan has."""
    at = data.index(b"\xff\xda") + 5 + 2 * 3
    return data[:at] + b"\x00\x3e\x00" + data[at + 3 :]


ODD: dict[str, Callable[[bytes], bytes]] = {
    "version 7 of JFIF": lambda data: data.replace(b"JFIF\0\x01\x01", b"JFIF\0\x07\x01"),
    "version 0 of JFIF": lambda data: data.replace(b"JFIF\0\x01\x01", b"JFIF\0\x00\x00"),
    "bounds of the scan": set_sos,
    "both": lambda data: set_sos(data.replace(b"JFIF\0\x01\x01", b"JFIF\0\x07\x01")),
    "a version and bytes to spare": lambda data: (
        data.replace(b"JFIF\0\x01\x01", b"JFIF\0\x07\x01")[:-2] + bytes(50) + END
    ),
    "bytes behind the end": lambda data: data + b"more" * 100,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_odd_headers_are_no_damage(odd: Callable[[bytes], bytes]) -> None:
    assert odd(PLAIN) != PLAIN
    assert np.array_equal(luminance(odd(PLAIN)), luminance(PLAIN))


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
@pytest.mark.parametrize("filling", [b"", END, bytes(5_000) + END])
def test_an_oddity_hides_no_truncation(odd: Callable[[bytes], bytes], filling: bytes) -> None:
    for cut in range(SCAN + 20, len(PLAIN) - 40, 397):
        with pytest.raises(ValueError):
            luminance(odd(PLAIN)[:cut] + filling)


def test_damage_that_leaves_bytes_to_spare_is_mostly_refused() -> None:
    """Of bit flips that libjpeg notices by them alone; the others end as bytes to spare would."""
    rng, noticed, read = np.random.default_rng(1), 0, 0
    for seed in range(4):
        data = jpeg(seed, quality=90)
        for at in rng.integers(data.index(b"\xff\xda") + 20, len(data) - 2, 60):
            flipped = bytearray(data)
            flipped[at] ^= 1 << rng.integers(8)
            if "extraneous" in first_warning(bytes(flipped)):
                noticed += 1
                with suppress(ValueError):
                    luminance(bytes(flipped))
                    read += 1
    assert noticed >= 15
    assert read <= noticed / 3
