"""One pass over a raw tar: a row of facts an image."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.data.images import decode_strictly, difference_hash, read_header
from stages.data.raw import members


def scan_tar(path: Path, folder: Path, batch: str) -> list[dict[str, Any]]:
    """Facts (stages/data/facts.py) of every file in a raw tar below `folder`, in the tar's order."""
    return list(_rows(path, folder, batch))


def _rows(path: Path, folder: Path, batch: str) -> Iterator[dict[str, Any]]:
    with path.open("rb") as tar:
        for member in members(path, folder):
            tar.seek(member.offset)
            yield {
                "key": f"{batch}/{member.path}",
                "batch": batch,
                "source_split": member.split,
                "class_name": member.class_name,
                "tar": path.relative_to(folder).as_posix(),
                "offset": member.offset,
                "bytes": member.size,
                **image_facts(tar.read(member.size)),
            }


def image_facts(data: bytes) -> dict[str, Any]:
    """What one image is, from its bytes alone."""
    header = read_header(data)
    facts: dict[str, Any] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "format": header.format,
        "width": header.width,
        "height": header.height,
        "mode": header.mode,
        "orientation": header.orientation,
        "decodes": False,
        "error": "",
        "hash": 0,
        "brightness": float("nan"),
        "contrast": float("nan"),
    }
    try:
        luminance = decode_strictly(data, header)
    except ValueError as error:
        return facts | {"error": str(error)}
    return facts | {
        "decodes": True,
        "hash": difference_hash(luminance),
        "brightness": float(luminance.mean()),
        "contrast": float(luminance.std()),
    }
