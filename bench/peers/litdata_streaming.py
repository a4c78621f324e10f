"""LitData: `optimize`, StreamingDataset and StreamingDataLoader, decoding by torchvision.io, transforms v2."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize  # type: ignore[import-not-found]
from PIL import Image
from torchvision.transforms import v2

from bench.peers.protocol import MEAN, STD, Round, arguments, labelled_images, prepared, serve, timed_epoch


class Images(StreamingDataset):
    """Crops of the stored images, float32, [3, size, size], and their labels."""

    def __init__(self, size: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.transform = v2.Compose([
            v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
        found = super().__getitem__(index)
        image = found["image"]
        # Grey JPEGs come with one channel.
        return self.transform(image if image.shape[0] == 3 else image[:1].expand(3, -1, -1)), found["label"]


def sample(labelled: tuple[str, int]) -> dict[str, Any]:
    """What is stored of an image: a JPEG that PIL opened keeps its own bytes."""
    path, label = labelled
    return {"image": Image.open(path), "label": label}


def write(options: argparse.Namespace, folder: Path) -> None:
    """The images as LitData's chunks."""
    # `optimize` empties its caches first, and by default they are $TMPDIR/chunks and $TMPDIR/data, whoever's these are.
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(options.work / "litdata-cache/chunks")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(options.work / "litdata-cache/data")
    inputs = [(str(path), label) for path, label in labelled_images(options.images, options.epoch)]
    # Whatever starts its workers also starts the loader's, and these shall start as with the other peers.
    optimize(sample, inputs, str(folder), chunk_bytes="64MB", num_workers=options.threads, start_method="fork")


def prepare(options: argparse.Namespace) -> Round:
    """Writes the chunks; the loader is made in the first round."""
    folder = prepared(options.work / "chunks", lambda aside: write(options, aside))
    loaders: list[StreamingDataLoader] = []

    def epoch() -> StreamingDataLoader:
        if not loaders:
            images = Images(options.size, str(folder), shuffle=True, cache_dir=str(options.work / "litdata-cache/read"))
            loaders.append(StreamingDataLoader(images, batch_size=options.batch, num_workers=options.threads))
        return loaders[0]

    return lambda: timed_epoch(epoch, options.epoch)


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    serve(["litdata"], lambda: prepare(given))
