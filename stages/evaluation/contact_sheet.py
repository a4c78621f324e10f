"""The page of a label queue: one file with a thumbnail of each image, in the order in which to label them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from stages.pages import templates
from stages.pages.images import image_thumbnail

THUMBNAIL, QUALITY = 160, 80
"""The longer side in pixels, and of the JPEG; a sheet of a hundred is about a megabyte."""


def contact_sheet(
    batch: str, images: int, candidates: int, rows: Sequence[Mapping[str, Any]], jpegs: Mapping[str, bytes]
) -> str:
    """One self-contained HTML page.

    Args:
        batch: whose images they are.
        images: how many of the batch have no label.
        candidates: how many of these the model was least sure of, which `rows` are drawn from.
        rows: as in queue.csv.
        jpegs: the encoded image of each row's key.
    """
    thumbnails = [image_thumbnail(Image.open(io.BytesIO(jpegs[row["key"]])), THUMBNAIL, QUALITY) for row in rows]
    template = Path(__file__).with_name("contact_sheet.html.j2")
    return templates.render(template, batch=batch, images=images, candidates=candidates, rows=rows, jpegs=thumbnails)
