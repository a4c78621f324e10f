"""Is the loop the bottleneck? Our trainer beside a bare loop on the same tensors in memory, and on shards.

The same network, optimiser, batches and precision. The bare loop does nothing but forward, backward and a step. What
the trainer on shards lacks to the trainer on tensors is what loading costs. The first round, in which torch.compile
compiles and a GPU chooses its kernels, does not count.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.prepared import written_shards
from bench.rounds import Candidate, Goal, arguments, machine, measured, report, versions

if TYPE_CHECKING:
    import torch

    from stages.data.shards.loading.samples.index import Samples
    from stages.training.networks.devices import Compute

BARE, MEMORY, SHARDS = "bare loop, tensors", "Synset, tensors", "Synset, shards"
Batch = tuple["torch.Tensor", "torch.Tensor"]
CLASSES = 10


def main() -> int:
    """Measures and prints; the exit code of --check."""
    parser = arguments(__doc__)
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="of the crops, px")
    parser.add_argument("--side", type=int, default=160, help="shorter side of the images in the shards, px")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the shards for the next time")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--not-deterministic", action="store_true")
    options = parser.parse_args()
    before = machine()
    logging.getLogger().setLevel(logging.ERROR)

    from stages.params.training.training import Training
    from stages.training.networks.devices import set_up

    compute = set_up(
        Training(threads=options.threads, compile=options.compile, deterministic=not options.not_deterministic)
    )
    with tempfile.TemporaryDirectory() as work:
        shards = written_shards(options.images.resolve(), options.side, (options.work or Path(work)).resolve())
        samples = _samples(shards, options)
        task = _Task(options, samples, compute, Path(work))
        candidates = [
            Candidate(BARE, "limit", task.bare),
            Candidate(MEMORY, "ours", lambda: task.trainer(task.in_memory)),
            Candidate(SHARDS, "ours", lambda: task.trainer(task.from_shards)),
        ]
        title = f"{options.architecture}, {options.size} px, {compute.kind}{', compiled' if options.compile else ''}"
        # On a CPU decoding takes the cores that training wants, whoever does it.
        goals = [Goal(MEMORY, BARE, 0.97), *([Goal(SHARDS, MEMORY, 0.97)] if compute.on_gpu else [])]
        table = measured(title, "images/s", candidates, goals, rounds=options.rounds)
    print(f"\nthe loader's share of the time: {max(1 - table.ratio(SHARDS, MEMORY), 0):.1%}")
    return report([table], options, before, versions("torch", "torchvision", "nvidia-dali-cuda130"))


def _samples(shards: Path, options: argparse.Namespace) -> "Samples":
    """As many as a round needs, again and again where there are fewer."""
    import numpy as np

    from stages.data.shards.loading.samples.index import read_samples

    samples = read_samples([shards], "train")
    wanted = np.resize(np.arange(len(samples)), options.steps * options.batch_size)
    return samples.at(wanted)


class _Task:
    """One network's training, fed from memory or from shards, by our trainer or by a bare loop."""

    def __init__(self, options: argparse.Namespace, samples: "Samples", compute: "Compute", work: Path) -> None:
        from stages.params.training.recipe import Recipe
        from stages.training.loop.train_batches import train_batches

        self.options, self.compute, self.work = options, compute, work
        self.recipe = Recipe(epochs=1, batch_size=options.batch_size, lr=0.01)
        self.from_shards = train_batches(samples, self.recipe, compute).batches
        self.tensors: list[Batch] = [
            (images.clone(), labels % CLASSES) for images, labels in self.from_shards(1, 0, options.size)
        ]
        self.empty = samples.at([])
        self.network = self._network()

    def _network(self) -> Any:
        from stages.training.networks.models import build

        config = {"architecture": self.options.architecture, "classes": list("0123456789"), "mean": [0.5] * 3}
        return self.compute.place(build(config | {"std": [0.25] * 3, "image_size": self.options.size}, seed=1))

    def in_memory(self, _epoch: int, _start: int, _size: int) -> Iterator[Batch]:
        """The batches of an epoch, at no cost."""
        return iter(self.tensors)

    def trainer(self, batches: Callable[[int, int, int], Iterator[Batch]]) -> float:
        """Images a second of `fit`."""
        from stages.training.loop.loop import fit
        from stages.training.loop.objectives import Supervised, ValidationView
        from stages.training.loop.state import Setup
        from stages.training.loop.train_batches import Feed

        rates = []
        model, size = self.network, self.options.size
        feed = Feed(len(self.tensors) * self.recipe.batch_size, 1, self._labelled(batches))
        objective = Supervised(model, self.recipe, ValidationView(self.empty, size, size, 1), self.compute)
        groups = [(list(model.parameters()), self.recipe.lr)]
        setup = Setup("bench", model, groups, feed, objective, self.recipe, size, self.compute)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            fit(setup, Path(folder), lambda metrics, _: rates.append(metrics["images_per_second"]))
        return rates[0]

    def _labelled(
        self, batches: Callable[[int, int, int], Iterator[Batch]]
    ) -> Callable[[int, int, int], Iterator[Batch]]:
        return lambda *place: ((images, labels % CLASSES) for images, labels in batches(*place))

    def bare(self) -> float:
        """Images a second of forward, backward and step."""
        import torch
        from torch.nn import functional

        model = self.network.train()
        if self.options.compile:
            model.compile()
        optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        began = time.perf_counter()
        for images, labels in self.tensors:
            optimiser.zero_grad(set_to_none=True)
            with self.compute.autocast():
                loss = functional.cross_entropy(model(images), labels, label_smoothing=0.1)
            loss.backward()
            optimiser.step()
        if self.compute.on_gpu:
            torch.cuda.synchronize()
        return len(self.tensors) * self.recipe.batch_size / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
