"""Images to train on in a second: of two classes, one dark and one light."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.writing import write_shard_set
from stages.data.sources.parts import Group, SourceFile
from stages.params.shard import Shard
from tests.raw_tars import scan_tar, write_tar

CONFIG: dict[str, Any] = {
    "architecture": "resnet18", "classes": ["dark", "light"], "image_size": 32, "resize": 32,
    "mean": [0.5] * 3, "std": [0.25] * 3,
}  # fmt: skip


def dark_and_light(folder: Path) -> tuple[Samples, Samples]:
    """32 training and 8 val images, from shards written to `folder`."""
    rng = np.random.default_rng(1)
    rows = []
    for label, name in enumerate(CONFIG["classes"]):
        files = []
        for number in range(20):
            file = io.BytesIO()
            pixels = rng.integers(130 * label, 130 * label + 120, (36, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "JPEG")
            files.append(SourceFile(f"{number}.jpg", partial(io.BytesIO, file.getvalue())))
        write_tar(Group("all", name, files), folder / "raw")
        rows += [row | {"label": label} for row in scan_tar(folder / f"raw/all/{name}.tar", folder / "raw", "mine")]
    accepted = pd.DataFrame(rows)
    accepted["split"] = np.where(np.arange(len(accepted)) % 5 == 0, "val", "train")
    write_shard_set(accepted, folder / "raw", folder / "mine", Shard(resize=36), "finetune", "mine")
    return read_samples([folder / "mine"], "train"), read_samples([folder / "mine"], "val")
