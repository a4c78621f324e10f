"""A small batch for tests of what comes after validate: raw tars and their accepted rows."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from stages.data.shards.writing import COLUMNS
from stages.params.shard import Shard

SHARD = Shard(resize=40, quality=90, images_per_shard=16, seed=1)


def jpeg(
    seed: int, size: tuple[int, int] = (60, 50), mode: str = "RGB", form: str = "JPEG", **options: object
) -> bytes:
    """A blurred picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, form, **options)
    return file.getvalue()


def accepted_batch(folder: Path, count: int, batch: str = "mine") -> pd.DataFrame:
    """Raw tars below `folder` with `count` images of three classes, and what shard reads of their accepted rows."""
    rows = []
    for label, name in enumerate("abc"):
        path = folder / "all" / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for number in range(label, count, 3):
                data = jpeg(1000 * label + number)
                info = tarfile.TarInfo(f"{number:04d}.x.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                key, offset = f"{batch}/all/{name}/{info.name}", tar.offset - -(-len(data) // 512) * 512
                digest = hashlib.sha256(data).hexdigest()
                rows.append((key, f"all/{name}.tar", offset, len(data), digest, label))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame["split"] = np.where(np.arange(len(frame)) % 5 == 0, "test", "train")
    return frame
