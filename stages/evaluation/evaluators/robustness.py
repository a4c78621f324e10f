"""Robustness: how often a model is still correct on corrupted or attacked images, or predicts the same on moved ones.

All on the same images, beside the clean top-1 on just these:

- *Corruptions* (Hendrycks & Dietterich 2019): error in each severity and its mean. The mean corruption error is not
  divided by AlexNet's errors as theirs is: those are of the thousand classes of ImageNet at 224 px, and say nothing of
  other classes and sizes. The *relative* error is that above the clean one.
- *Attacks*: FGSM and PGD at each epsilon, as `stages.training.networks.attacks` makes them.
- *Consistency*: whether the predicted class stays the same, right or wrong (Zhang 2019, "Making Convolutional Networks
  Shift-Invariant Again").
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import pad, rotate

from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples
from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result
from stages.evaluation.evaluators.corruptions import corrupted
from stages.evaluation.metrics import Bools, Float64, Int64
from stages.evaluation.statistics.bootstrap import mean_interval
from stages.evaluation.statistics.intervals import wilson
from stages.pages.images import thumbnail
from stages.pages.text import words
from stages.params.evaluate import Evaluate, Robustness
from stages.params.training.recipe import Adversarial
from stages.runtime.command import StageError
from stages.training.networks.attacks import attacked
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier

name = "robustness"

PART = 50
"""Batch size, whatever `batch_size` is: an attack draws its random start for a whole batch."""
SHIFTS = (0.01, 0.02, 0.03, 0.04)
"""Of the side."""
DEGREES = 10.0
EXAMPLES = 2
EXAMPLE_SEVERITY = 3
COLUMNS = ["kind", "change", "top1", "low", "high", *(f"severity_{severity}" for severity in range(1, 6))]
"""Of reports/plots/robustness.csv."""

Outcomes = dict[tuple[str, str, str], Bools]
"""(N,) each: whether the prediction is correct (consistency: unchanged), by group, kind and change, such as
("clean", "", ""), ("corruptions", "fog", "3"), ("attacks", "pgd", "4"), ("consistency", "shift", "left 2")."""


@dataclass(frozen=True)
class Example:
    """An image as the model sees it and as it was corrupted, (H, W, 3) uint8 each."""

    key: str
    label: int
    severity: int
    clean: np.ndarray
    corrupted: dict[str, np.ndarray]


@dataclass(frozen=True)
class Robust:
    """`figures` is what `measure_robustness` describes; `examples` are for the report."""

    figures: dict[str, Any]
    examples: list[Example]


def measure(inputs: EvaluationInputs) -> Result:
    """`robustness`: as `measure_robustness` has it, of each corruption only the mean error; None if not wanted."""
    template, wanted, config = Path(__file__).with_suffix(".html.j2"), inputs.settings.robustness, inputs.config
    if not wanted:
        table = pd.DataFrame([], columns=COLUMNS)
        return Result(ReportSection(template, {"robust": None, "examples": []}), {name: None}, {name: table})
    found = measure_robustness(
        inputs.model,
        inputs.test.samples,
        wanted,
        image_size=config["image_size"],
        resize=config["resize"],
        settings=inputs.settings,
        compute=inputs.compute,
    )
    errors = {kind: figures["error"] for kind, figures in found.figures["corruptions"].items()}
    values = {"robust": found.figures, "examples": [_pictures(example) for example in found.examples]}
    return Result(
        ReportSection(template, values),
        {name: found.figures | {"corruptions": errors}},
        {name: pd.DataFrame(rows(found.figures), columns=COLUMNS)},
    )


def measure_robustness(
    model: Classifier,
    samples: Samples,
    wanted: Robustness,
    *,
    image_size: int,
    resize: int,
    settings: Evaluate,
    compute: Compute,
) -> Robust:
    """Predicts all changes of at most `wanted.images` of the images.

    Shares in 0-1. `*_low` and `*_high` are ends of the interval: Wilson's of proportions; of means over changes of the
    same image, which are no proportions of independent draws, the bootstrap's over images.

    - `images`: how many
    - `clean`: `top1`
    - `corruptions`: of each name `error`, its mean over severities, `relative`, that above the clean error, and
      `top1`: of each severity `top1`
    - `mce`: `error` and `relative`, their means over corruptions; absent without corruptions
    - `attacks`: of `fgsm` and `pgd`, of each epsilon, `top1`. An image that is wrong without an attack counts as
      fooled. PGD leaves alone what FGSM of this epsilon or PGD of a smaller one has fooled, since these are within
      reach of it too: its figure is the share that withstands all of them.
    - `consistency`: of `flip`, `shift` and `rotation` `same`, the share of images whose class stays the same under
      every one of the changes, and `mean`, that of all pairs of an image and a change

    Args:
        model: on the device, in evaluation mode; its logits are (n, C) float32.
        samples: labelled ones.
        image_size, resize: in pixels, as the model was trained for.

    Raises:
        StageError: there are no images, or the model gives what is not a number.
    """
    if not len(samples):
        raise StageError("there is no labelled image to measure robustness on")
    chosen = samples.at(spread(samples.label, wanted.images, settings.seed))
    batches = evaluation_batches(
        chosen, image_size=resize, resize=resize, batch_size=PART, threads=compute.threads, device=compute.device
    )
    parts: list[Outcomes] = []
    examples: list[Example] = []
    keys = iter(chosen.key)
    for wide, labels in ((images.cpu(), labels.cpu()) for images, labels in batches):
        these = list(itertools.islice(keys, len(labels)))
        batch = _Perturbed(model, compute, _cropped(wide, image_size), labels, these, wanted, settings.seed)
        parts.append({**batch.clean(), **batch.corruptions(), **batch.attacks(), **batch.moves(wide)})
        examples += batch.examples(EXAMPLES - len(examples))
    outcomes = {what: np.concatenate([part[what] for part in parts]) for what in parts[0]}
    return Robust(figures(outcomes, settings), examples)


def spread(labels: Int64, count: int, seed: int) -> Int64:
    """Places of `count` images, or of all, in rising order: as many of each class as can be, drawn by the seed.

    What a smaller `count` chooses a larger one chooses too.

    Args:
        labels: (N,) in 0..C-1.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turn[order], kind="stable")][:count])


def _cropped(wide: Tensor, side: int, down: int = 0, right: int = 0) -> Tensor:
    """The centre crop, moved by some pixels."""
    spare = wide.shape[-1] - side
    top, left = (spare + 1) // 2 + down, (spare + 1) // 2 + right  # rounded as DALI does
    return wide[:, :, top : top + side, left : left + side]


@dataclass(frozen=True)
class _Perturbed:
    """A batch of images (n, 3, H, W) uint8 on the CPU, and what the model predicts for changed versions of them."""

    model: Classifier
    compute: Compute
    images: Tensor
    labels: Tensor
    keys: list[str]
    wanted: Robustness
    seed: int

    def classes(self, images: Tensor) -> Int64:
        """(n,) predicted classes."""
        with torch.inference_mode(), self.compute.autocast():
            logits = self.model(self._placed(images)).float()
        if not logits.isfinite().all():
            raise StageError("the model gives what is not a number; its weights are damaged or its training diverged")
        predicted: Int64 = logits.argmax(1).cpu().numpy()
        return predicted

    def correct(self, images: Tensor) -> Bools:
        """(n,) whether the prediction is correct."""
        return np.asarray(self.classes(images) == self.labels.numpy())

    @cached_property
    def predicted(self) -> Int64:
        """(n,) predicted classes of the unchanged images."""
        return self.classes(self.images)

    def clean(self) -> Outcomes:
        return {("clean", "", ""): self.predicted == self.labels.numpy()}

    def corruptions(self) -> Outcomes:
        return {
            ("corruptions", name, str(severity)): self.correct(self.corrupted(name, severity))
            for name in self.wanted.corruptions
            for severity in range(1, self.wanted.severities + 1)
        }

    def corrupted(self, name: str, severity: int) -> Tensor:
        """The images; each depends on the seed and its key, not on the other images."""
        return corrupted(self.images, name, severity, [_seed(self.seed, name, key) for key in self.keys])

    def attacks(self) -> Outcomes:
        outcomes: Outcomes = {}
        (right,) = self.clean().values()
        standing = right
        for epsilon in sorted(self.wanted.epsilons):
            fgsm = self._withstood(right, Adversarial(method="fgsm", epsilon=epsilon))
            pgd = Adversarial(method="pgd", epsilon=epsilon, steps=self.wanted.pgd_steps)
            standing = self._withstood(standing & fgsm, pgd)
            outcomes["attacks", "fgsm", f"{epsilon:g}"] = fgsm
            outcomes["attacks", "pgd", f"{epsilon:g}"] = standing
        return outcomes

    def _withstood(self, standing: Bools, settings: Adversarial) -> Bools:
        """(n,) which of `standing`, those that are still classified correctly, withstand the attack."""
        if not standing.any():
            return standing
        images, labels = self._placed(self.images[standing]), self.labels[standing].to(self.compute.device)
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []), self.compute.autocast():
            torch.manual_seed(_seed(self.seed, settings.method, *self.keys))
            try:
                worst = attacked(self.model, images, labels, settings)
            except RuntimeError as error:
                if "does not have a deterministic implementation" not in str(error):
                    raise
                raise StageError(
                    "an attack needs a gradient that a GPU computes in one way today and in another tomorrow; set "
                    "`evaluate.robustness.epsilons` to [], or `training.deterministic` to false"
                ) from error
        left = standing.copy()
        left[standing] = self.classes(worst) == self.labels[standing].numpy()
        return left

    def moves(self, wide: Tensor) -> Outcomes:
        """Whether the class stays the same; the images are the centre crops of `wide`."""
        return {
            ("consistency", *what): np.asarray(self.classes(images) == self.predicted)
            for what, images in moved(wide, self.images.shape[-1])
        }

    def examples(self, count: int) -> list[Example]:
        """Up to `count` images, the first of each class."""
        severity = min(EXAMPLE_SEVERITY, self.wanted.severities)
        _, first = np.unique(self.labels.numpy(), return_index=True)
        places = np.sort(first)[: max(count, 0)]
        few = _Perturbed(
            self.model,
            self.compute,
            self.images[places],
            self.labels[places],
            [self.keys[i] for i in places],
            self.wanted,
            self.seed,
        )
        changed = {name: few.corrupted(name, severity) for name in self.wanted.corruptions}
        return [
            Example(
                few.keys[i],
                int(few.labels[i]),
                severity,
                _picture(few.images[i]),
                {name: _picture(images[i]) for name, images in changed.items()},
            )
            for i in range(len(places))
        ]

    def _placed(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.compute.channels_last else torch.contiguous_format
        return images.to(self.compute.device).contiguous(memory_format=layout)


def _seed(seed: int, *names: str) -> int:
    """56 bits, which numpy and torch accept."""
    text = "\0".join([str(seed), *names])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _picture(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()


def moved(wide: Tensor, side: int) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Centre crops flipped, shifted and rotated: names of kind and change, and (n, 3, side, side) uint8.

    Shifts and rotated corners show real pixels around the crop. Only where `resize` leaves too few, the border is
    mirrored.

    Args:
        wide: (n, 3, resize, resize) uint8 on the CPU, with `resize` at least `side`.
    """
    yield ("flip", "horizontal"), _cropped(wide, side).flip(3)
    turned = math.ceil(side * (math.cos(math.radians(DEGREES)) + math.sin(math.radians(DEGREES)))) + 2
    distances = sorted({max(1, round(share * side)) for share in SHIFTS})
    missing = max(0, max(turned, side + 2 * distances[-1]) - wide.shape[-1])
    padding = -(-missing // 2)
    around = pad(wide, [padding] * 4, padding_mode="reflect") if padding else wide
    for distance in distances:
        for name, down, right in (("up", -1, 0), ("down", 1, 0), ("left", 0, -1), ("right", 0, 1)):
            yield ("shift", f"{name} {distance}"), _cropped(around, side, distance * down, distance * right)
    for degrees in (-DEGREES, DEGREES):
        rotated = rotate(around, degrees, interpolation=InterpolationMode.BILINEAR)
        yield ("rotation", f"{degrees:+g}"), _cropped(rotated, side)


def figures(outcomes: Outcomes, settings: Evaluate) -> dict[str, Any]:
    """As `measure` describes them."""
    clean = outcomes["clean", "", ""]
    errors = {
        name: np.mean([~right for right in each.values()], axis=0)
        for name, each in _kinds(outcomes, "corruptions").items()
    }
    found: dict[str, Any] = {"images": len(clean), "clean": _share("top1", clean, settings)}
    if errors:
        found["mce"] = _errors(np.mean(list(errors.values()), axis=0), clean, settings)
    found["corruptions"] = {
        name: {
            **_errors(errors[name], clean, settings),
            "top1": {severity: _share("top1", right, settings) for severity, right in each.items()},
        }
        for name, each in _kinds(outcomes, "corruptions").items()
    }
    found["attacks"] = {
        method: {epsilon: _share("top1", right, settings) for epsilon, right in each.items()}
        for method, each in _kinds(outcomes, "attacks").items()
    }
    found["consistency"] = {
        kind: {
            **_share("same", np.all(list(each.values()), axis=0), settings),
            **_mean("mean", np.mean(list(each.values()), axis=0), settings),
        }
        for kind, each in _kinds(outcomes, "consistency").items()
    }
    return found


def _kinds(outcomes: Outcomes, group: str) -> dict[str, dict[str, Bools]]:
    """The outcomes of one group, by kind and by change."""
    found: dict[str, dict[str, Bools]] = {}
    for (of, kind, change), each in outcomes.items():
        if of == group:
            found.setdefault(kind, {})[change] = each
    return found


def _errors(error: Float64, clean: Bools, settings: Evaluate) -> dict[str, float]:
    """Mean of the error of each image, (N,) in 0-1, and the mean above the clean error."""
    return {**_mean("error", error, settings), **_mean("relative", error - ~clean, settings)}


def _share(name: str, right: Bools, settings: Evaluate) -> dict[str, float]:
    low, high = wilson(right.sum(), len(right), settings.confidence)
    return {name: float(right.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def _mean(name: str, values: Float64, settings: Evaluate) -> dict[str, float]:
    low, high = mean_interval(values, settings.bootstrap, settings.seed, settings.confidence)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every kind of change as a row of reports/plots/robustness.csv, shares 0-1 with their intervals.

    Of corruptions the mean over severities, and each severity in a column.

    Args:
        figures: as `measure_robustness` describes them.
    """
    table = [_change("clean", "as they are", figures["clean"], "top1")]
    for kind, each in figures["corruptions"].items():
        mean = {"top1": 1 - each["error"], "low": 1 - each["error_high"], "high": 1 - each["error_low"]}
        severities = {f"severity_{severity}": top1["top1"] for severity, top1 in each["top1"].items()}
        table.append({"kind": "corruption", "change": words(kind)} | mean | severities)
    for method, by_epsilon in figures["attacks"].items():
        table += [
            _change("attack", f"{method}, epsilon {epsilon}", top1, "top1") for epsilon, top1 in by_epsilon.items()
        ]
    table += [
        _change("consistency", f"same after {kind}", each, "same") for kind, each in figures["consistency"].items()
    ]
    return table


def _change(kind: str, change: str, figures: Mapping[str, float], figure: str) -> dict[str, Any]:
    ends = {"top1": figures[figure], "low": figures[f"{figure}_low"], "high": figures[f"{figure}_high"]}
    return {"kind": kind, "change": change} | ends


def _pictures(example: Example) -> dict[str, Any]:
    """An image as it was and in every corruption, encoded."""
    pictures = {"as it is": example.clean} | example.corrupted
    return {"severity": example.severity, "pictures": {words(kind): thumbnail(each) for kind, each in pictures.items()}}
