"""torchvision: ImageFolder and DataLoader, PIL decoding, transforms v1 (the default) or v2."""

import argparse
from pathlib import Path

import torch
import torchvision
from torchvision.datasets import ImageFolder

from bench.peers.protocol import MEAN, STD, Round, arguments, labelled_images, prepared, serve, timed_epoch


def transform(size: int, second: bool) -> torch.nn.Module:
    """The training transform of torchvision's own examples, in either version."""
    if second:
        from torchvision.transforms import v2

        return v2.Compose([
            v2.ToImage(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip
    from torchvision import transforms

    return transforms.Compose([
        transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


def prepare(options: argparse.Namespace) -> Round:
    """A folder of links, one an image of the epoch, is the dataset."""

    def link(folder: Path) -> None:
        for number, (path, label) in enumerate(labelled_images(options.images, options.epoch)):
            (folder / f"{label:04d}").mkdir(parents=True, exist_ok=True)
            (folder / f"{label:04d}" / f"{number:06d}{path.suffix}").symlink_to(path)

    folder = prepared(options.work / "folder", link)
    loaders: list[torch.utils.data.DataLoader[object]] = []

    def epoch() -> torch.utils.data.DataLoader[object]:
        # Made in the first round, because its first batch waits for it.
        if not loaders:
            images = ImageFolder(str(folder), transform(options.size, options.v2))
            loaders.append(
                torch.utils.data.DataLoader(images, options.batch, shuffle=True, num_workers=options.threads)
            )
        return loaders[0]

    return lambda: timed_epoch(epoch, options.epoch)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--v2", action="store_true", help="transforms v2")
    given = parser.parse_args()
    serve(["torch", torchvision.__name__, "pillow"], lambda: prepare(given))
