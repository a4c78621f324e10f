"""FFCV in JPEG mode: its own random-resized-crop decoder, a true shuffle (`OrderOption.RANDOM`), the file in memory.

Its writer decodes and encodes every image anew (quality 90), also those that are JPEGs.
"""

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch  # noqa: F401, before ffcv, whose library wants its
from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found]
from ffcv.fields.decoders import (  # type: ignore[import-not-found]
    IntDecoder,
    RandomResizedCropRGBImageDecoder,
)
from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found]
from ffcv.transforms import (  # type: ignore[import-not-found]
    NormalizeImage,
    RandomHorizontalFlip,
    Squeeze,
    ToTensor,
    ToTorchImage,
)
from ffcv.writer import DatasetWriter  # type: ignore[import-not-found]
from PIL import Image

from bench.peers.protocol import MEAN, STD, Round, arguments, labelled_images, prepared, serve, timed_epoch


class Images:
    """What the writer reads."""

    def __init__(self, labelled: Sequence[tuple[Path, int]]) -> None:
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        path, label = self.labelled[number]
        with Image.open(path) as image:
            return image.convert("RGB"), label


def write(options: argparse.Namespace, path: Path) -> None:
    """The images as FFCV's own file."""
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    writer = DatasetWriter(str(path), fields, num_workers=options.threads)
    writer.from_indexed_dataset(Images(labelled_images(options.images, options.epoch)), chunksize=100)


def end_with_thread(error: threading.ExceptHookArgs) -> None:
    """Where the thread that loads fails, FFCV's loader waits for it for ever: better an end with its words."""
    sys.__excepthook__(error.exc_type, error.exc_value or error.exc_type(), error.exc_traceback)
    os._exit(1)


def prepare(options: argparse.Namespace) -> Round:
    """Writes the file; the loader is made in the first round, because its first batch waits for its compiler."""
    path = prepared(options.work / "images.beton", lambda aside: write(options, aside))
    loaders: list[Loader] = []

    def epoch() -> Loader:
        if not loaders:
            image = [RandomResizedCropRGBImageDecoder((options.size, options.size)), RandomHorizontalFlip()]
            if options.output == "float32":
                image.append(NormalizeImage(255 * np.array(MEAN), 255 * np.array(STD), np.float32))
            pipelines = {"image": [*image, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor(), Squeeze()]}
            loaders.append(
                Loader(str(path), batch_size=options.batch, num_workers=options.threads, order=OrderOption.RANDOM,
                       os_cache=True, drop_last=False, pipelines=pipelines)
            )  # fmt: skip
        return loaders[0]

    return lambda: timed_epoch(epoch, options.epoch)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--output", choices=("uint8", "float32"), default="uint8")
    given = parser.parse_args()
    threading.excepthook = end_with_thread
    serve(["ffcv", "numba"], lambda: prepare(given))
