"""webdataset: tars written shuffled, WebDataset and WebLoader, PIL decoding, torchvision's default transform."""

import argparse
import random
from pathlib import Path

import webdataset

from bench.peers.protocol import Round, arguments, labelled_images, prepared, serve, timed_epoch
from bench.peers.torchvision_folder import transform

IMAGES_PER_TAR = 250


def write(options: argparse.Namespace, folder: Path) -> None:
    """The images' own bytes as tars."""
    folder.mkdir()
    labelled = list(enumerate(labelled_images(options.images, options.epoch)))
    random.Random(1).shuffle(labelled)
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=IMAGES_PER_TAR, verbose=0) as writer:
        for number, (path, label) in labelled:
            writer.write({"__key__": f"{number:06d}", "jpg": path.read_bytes(), "cls": label})


def prepare(options: argparse.Namespace) -> Round:
    """Writes the tars; the loader is made in the first round."""
    folder = prepared(options.work / "tars", lambda aside: write(options, aside))
    tars = sorted(map(str, folder.glob("*.tar")))
    loaders: list[webdataset.WebLoader] = []

    def epoch() -> webdataset.WebLoader:
        if not loaders:
            crop = transform(options.size, second=False)
            images = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode("pil")
            images = images.to_tuple("jpg", "cls").map_tuple(crop, int).batched(options.batch)
            loaders.append(webdataset.WebLoader(images, batch_size=None, num_workers=options.threads))
        return loaders[0]

    return lambda: timed_epoch(epoch, options.epoch)


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    serve(["webdataset"], lambda: prepare(given))
