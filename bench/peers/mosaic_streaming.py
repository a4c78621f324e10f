"""Mosaic streaming: MDS shards, StreamingDataset and DataLoader, PIL decoding, torchvision's default transform."""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.peers.protocol import Round, arguments, labelled_images, prepared, serve, timed_epoch
from bench.peers.torchvision_folder import transform


def write(options: argparse.Namespace, folder: Path) -> None:
    """The images' own bytes as MDS shards."""
    from streaming import MDSWriter  # type: ignore[import-not-found]

    with MDSWriter(out=str(folder), columns={"image": "jpeg", "label": "int"}) as writer:
        for path, label in labelled_images(options.images, options.epoch):
            with Image.open(path) as image:
                # Of a JPEG that PIL opened, its own bytes are stored.
                writer.write({"image": image if image.format == "JPEG" else image.convert("RGB"), "label": label})


def prepare(options: argparse.Namespace) -> Round:
    """Writes the shards; the loader is made in the first round."""
    import streaming

    folder = prepared(options.work / "mds", lambda aside: write(options, aside))
    streaming.base.util.clean_stale_shared_memory()
    crop = transform(options.size, second=False)

    class Images(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[torch.Tensor, int]:
            found = super().__getitem__(at)
            return crop(found["image"].convert("RGB")), found["label"]

    loaders: list[torch.utils.data.DataLoader[Any]] = []

    def epoch() -> torch.utils.data.DataLoader[Any]:
        if not loaders:
            images = Images(local=str(folder), shuffle=True, batch_size=options.batch)
            loaders.append(torch.utils.data.DataLoader(images, options.batch, num_workers=options.threads))
        return loaders[0]

    return lambda: timed_epoch(epoch, options.epoch)


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    serve(["mosaicml-streaming"], lambda: prepare(given))
