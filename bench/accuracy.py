"""Does the faster loader cost accuracy? The same training on our crops and on those of torchvision, image by image.

Same model, recipe and seeds, same val images; only where training batches come from differs: our loader, or PIL with
torchvision's RandomResizedCrop and flip on the very same encoded images. Prints top-1 on val of every seed, and how the
two models of a seed differ on it (McNemar's exact test; Wilson's interval).
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from bench.prepared import written_shards


def main() -> int:
    """Trains twice a seed and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="train/CLASS/* and val/CLASS/*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="of the crops, px")
    parser.add_argument("--side", type=int, default=256, help="shorter side of the images in the shards, px")
    parser.add_argument("--check", action="store_true", help="ends with 1 where ours is significantly worse (5 %%)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as work:
        shards = written_shards(options.images.resolve(), options.side, Path(work))
        for seed in range(1, options.seeds + 1):
            hits = {name: _train(shards, seed, name == "torchvision", options) for name in ("Synset", "torchvision")}
            print(f"seed {seed}: " + ", ".join(f"{name} {each.mean():.1%}" for name, each in hits.items()), flush=True)
            ours.append(hits["Synset"])
            theirs.append(hits["torchvision"])
    worse = _compare(ours, theirs)
    return int(options.check and worse)


def _compare(ours: list[Any], theirs: list[Any]) -> bool:
    import numpy as np
    from scipy.stats import binomtest

    one, other = np.concatenate(ours), np.concatenate(theirs)
    won, lost = int((one & ~other).sum()), int((other & ~one).sum())
    p_value = binomtest(lost, won + lost, alternative="greater").pvalue if won + lost else 1.0
    for name, hits in (("Synset", one), ("torchvision", other)):
        low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        print(f"{name:<12} {hits.mean():.2%}  ({low:.1%} – {high:.1%})")
    print(f"Synset minus torchvision: {one.mean() - other.mean():+.2%}, p = {p_value:.3f} for 'Synset is worse'")
    return bool(p_value < 0.05)


def _train(shards: Path, seed: int, torchvision: bool, options: argparse.Namespace) -> Any:
    """Which val images the model gets right after training, (N,) bool."""
    import numpy as np

    from stages.data.loading import read_samples
    from stages.data.shard_sets import read_index
    from stages.evaluation.inference import logits_and_features
    from stages.params.training import Training
    from stages.training import loop
    from stages.training.devices import set_up
    from stages.training.models import build

    compute = set_up(Training(threads=2))
    train, val = (read_samples([shards], split) for split in ("train", "val"))
    index = read_index(shards)
    classes = [str(label) for label in range(int(train.label.max()) + 1)]
    model = build({"architecture": "resnet18", "classes": classes, "mean": index["mean"], "std": index["std"]}, seed)
    recipe = loop.Recipe(
        epochs=options.epochs, batch_size=64, weight_decay=5e-4, label_smoothing=0.1, warmup=0.2, min_crop_area=0.35,
        seed=seed, image_size=options.size, resize=round(options.size * 8 / 7),
    )  # fmt: skip
    ours = loop.training_batches
    if torchvision:
        loop.training_batches = _torchvision_batches
    try:
        with tempfile.TemporaryDirectory() as work:
            groups = [(list(model.parameters()), 0.1)]
            loop.fit(model, groups, train, val, recipe, compute, Path(work), lambda *_: None, "accuracy")
    finally:
        loop.training_batches = ours
    model.eval()
    logits = logits_and_features(
        val, {"it": model}, {}, image_size=recipe.image_size, resize=recipe.resize, batch_size=128, compute=compute
    )["it"]
    return np.asarray(logits.argmax(1) == val.label)


def _torchvision_batches(
    samples: Any, *, image_size: int, batch_size: int, min_crop_area: float, seed: int, epoch: int, **_: object
) -> Iterator[tuple[Any, Any]]:
    """As `training_batches`, by PIL and torchvision's transforms."""
    import torch
    from PIL import Image
    from torchvision import transforms

    from stages.data.loading import epoch_order

    transform = transforms.Compose([
        transforms.RandomResizedCrop(image_size, scale=(min_crop_area, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ])  # fmt: skip

    class Images(torch.utils.data.Dataset[tuple[Any, int]]):
        """By index."""

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image = Image.open(BytesIO(samples.jpeg(index))).convert("RGB")
            return transform(image), int(samples.label[index])

    order = epoch_order(samples, seed, epoch)
    batches = [part.tolist() for part in torch.as_tensor(order).tensor_split(-(-len(order) // batch_size))]
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    for images, labels in torch.utils.data.DataLoader(
        Images(), batch_sampler=batches, num_workers=2, generator=generator
    ):
        yield images.contiguous(memory_format=torch.channels_last), labels


if __name__ == "__main__":
    sys.exit(main())
