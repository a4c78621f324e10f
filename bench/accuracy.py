"""Does the faster loader cost accuracy? The same training on our crops and on those of torchvision, image by image.

Same network, recipe, seeds and order, same val images; only where training batches come from differs: our loader, or
PIL with torchvision's RandomResizedCrop and flip on the very same encoded images. Prints top-1 and loss on val of every
seed, and the mean differences of the two trainings of a seed with their intervals (paired t-test).

The network is a small residual one, not our trainer's, so that a seed takes minutes and there can be several.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.prepared import written_shards
from stages.data.shards.loading.order import epoch_order
from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.train_loading import TrainLoader

if TYPE_CHECKING:
    import torch

BATCH_SIZE, MIN_CROP_AREA, LR, THREADS = 64, 0.35, 0.1, 2
Batches = Callable[[Samples, int, int, int], Iterator[tuple["torch.Tensor", "torch.Tensor"]]]


class Result(NamedTuple):
    """On val: share of hits (0-1), and mean cross-entropy in nats."""

    top1: float
    loss: float


def main() -> int:
    """Trains twice a seed and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="train/CLASS/* and val/CLASS/*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="of the crops, px")
    parser.add_argument("--side", type=int, default=256, help="shorter side of the images in the shards, px")
    parser.add_argument("--check", action="store_true", help="ends with 1 where ours is worse by all of its interval")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be 2 at least: one tells nothing of how much trainings differ by luck")
    from scipy.stats import ttest_rel

    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as work:
        shards = written_shards(options.images.resolve(), options.side, Path(work))
        train, val = (read_samples([shards], split) for split in ("train", "val"))
        for seed in range(1, options.seeds + 1):
            ours.append(_train(train, val, _our_batches, seed, options.epochs, options.size))
            theirs.append(_train(train, val, _torchvision_batches, seed, options.epochs, options.size))
            print(
                f"seed {seed}: Synset {ours[-1].top1:.1%}, loss {ours[-1].loss:.3f}; "
                f"torchvision {theirs[-1].top1:.1%}, loss {theirs[-1].loss:.3f}",
                flush=True,
            )
    print(f"{len(train):,} training images, {options.epochs} epochs; Synset minus torchvision, with 95 % intervals:")
    intervals = {}
    for fact, scale, unit in (("top1", 100, "points of top-1"), ("loss", 1, "of loss")):
        one, other = ([scale * getattr(each, fact) for each in results] for results in (ours, theirs))
        # A training's luck differs by seed, so seeds are what is counted, not images.
        low, high = intervals[fact] = ttest_rel(one, other).confidence_interval(0.95)
        print(f"  {mean(one) - mean(other):+.3f} {unit} ({low:+.3f} to {high:+.3f})")
    return int(options.check and (intervals["top1"].high < 0 or intervals["loss"].low > 0))


def _train(train: Samples, val: Samples, batches: Batches, seed: int, epochs: int, size: int) -> Result:
    """SGD, one cycle (Smith & Topin 2017), label smoothing."""
    import torch
    from torch.nn import functional
    from torch.optim.lr_scheduler import OneCycleLR

    torch.manual_seed(seed)
    model = _network(int(train.label.max()) + 1)
    optimiser = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = OneCycleLR(optimiser, LR, total_steps=epochs * -(-len(train) // BATCH_SIZE), pct_start=0.25)
    for epoch in range(1, epochs + 1):
        for images, labels in batches(train, seed, epoch, size):
            loss = functional.cross_entropy(model(_scaled(images)), labels, label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()
    truth = torch.from_numpy(val.label)
    with torch.inference_mode():
        images_of_val = evaluation_batches(
            val, image_size=size, resize=round(size * 8 / 7), batch_size=BATCH_SIZE, threads=THREADS, device="cpu"
        )
        logits = torch.cat([model(_scaled(images)) for images, _ in images_of_val])
    hits = (logits.argmax(1) == truth).float()
    return Result(float(hits.mean()), float(functional.cross_entropy(logits, truth)))


def _scaled(images: "torch.Tensor") -> "torch.Tensor":
    return (images.float() - 114) / 66  # about ImageNet's mean and standard deviation


def _network(classes: int) -> "torch.nn.Module":
    import torch
    from torch import nn

    def convolution(into: int, out: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

    class Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.branch = nn.Sequential(convolution(width, width, 1), convolution(width, width, 1))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features + self.branch(features)

    model = nn.Sequential(
        convolution(3, 32, 2), convolution(32, 48, 2), Residual(48), convolution(48, 96, 2), Residual(96),
        convolution(96, 160, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, classes),
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def _our_batches(
    samples: Samples, seed: int, epoch: int, image_size: int
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    return TrainLoader(samples, BATCH_SIZE, MIN_CROP_AREA, seed, THREADS, "cpu").batches(epoch, 0, image_size)


def _torchvision_batches(
    samples: Samples, seed: int, epoch: int, image_size: int
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """The same by PIL and torchvision's transforms."""
    import torch
    from PIL import Image
    from torchvision import transforms

    transform = transforms.Compose([
        transforms.RandomResizedCrop(image_size, scale=(MIN_CROP_AREA, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ])  # fmt: skip

    class Images(torch.utils.data.Dataset[tuple[Any, int]]):
        """By index."""

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image = Image.open(BytesIO(samples.jpeg(index))).convert("RGB")
            return transform(image), int(samples.label[index])

    order = epoch_order(samples, seed, epoch)
    batches = [part.tolist() for part in torch.as_tensor(order).tensor_split(-(-len(order) // BATCH_SIZE))]
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    for images, labels in torch.utils.data.DataLoader(
        Images(), batch_sampler=batches, num_workers=THREADS, generator=generator
    ):
        yield images.contiguous(memory_format=torch.channels_last), labels


if __name__ == "__main__":
    sys.exit(main())
