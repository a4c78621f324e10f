"""Small JPEGs for the pages. Their bytes are part of the pages, so a change of encoder or filter changes every page."""

import io

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

LARGEST_SIDE = 160
"""Of an image on a page, in pixels."""


def thumbnail(pixels: npt.NDArray[np.uint8]) -> bytes:
    """RGB pixels (H, W, 3) as a JPEG of quality 85, at most 160 pixels wide and high; averaged over areas."""
    height, width = pixels.shape[:2]
    if (share := LARGEST_SIDE / max(height, width)) < 1:
        size = (max(round(share * width), 1), max(round(share * height), 1))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=85))


def jpeg_thumbnail(encoded: bytes) -> bytes:
    """The same of a JPEG."""
    return thumbnail(simplejpeg.decode_jpeg(encoded))


def image_thumbnail(image: Image.Image, side: int, quality: int) -> bytes:
    """A JPEG of an image that Pillow opened, at most `side` pixels wide and high. Changes the image."""
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
