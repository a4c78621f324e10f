"""Galleries: which test images a reviewer should see, with what spoke for the answers, and what they are like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.data.shards.loading.samples.index import Samples
from stages.evaluation.metrics import Float64, Floats, Int64, confidences, predicted_classes
from stages.pages.images import jpeg_thumbnail, thumbnail

if TYPE_CHECKING:
    from stages.evaluation.evaluators.training_images import TrainingImages
    from stages.training.networks.models import Classifier

MISTAKES = 24
HITS = 12
OF_EACH = 2
"""Mistakes, and hits, of each class."""
SUSPECTS = 24
DIGITS = 6
"""Confidences are compared to so many: what lies beyond differs between builds of numpy."""


@dataclass(frozen=True)
class Neighbour:
    """A training image that looks alike to the model."""

    key: str
    label: str
    jpeg: bytes


@dataclass(frozen=True)
class Picture:
    """A test image, what it is, what the model took it for, and why."""

    key: str
    actual: str
    predicted: str
    probability: float
    seen: bytes
    """The crop that the model saw, encoded."""
    heat: bytes
    """It with a heat map of what spoke for the answer."""
    neighbours: Sequence[Neighbour] = ()


@dataclass(frozen=True)
class Suspect:
    """A training image that looks mislabelled."""

    key: str
    label: str
    suggested: str
    label_probability: float
    suggested_probability: float
    jpeg: bytes


@dataclass(frozen=True)
class Galleries:
    """All pictures of the report."""

    mistakes: Sequence[Picture] = ()
    """The surest ones."""
    hits: Sequence[Picture] = ()
    """The least sure ones."""
    by_class: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    """The classes of lowest recall first."""
    suspects: Sequence[Suspect] = ()


@dataclass(frozen=True)
class Chosen:
    """Places of test images."""

    mistakes: Int64
    hits: Int64
    by_class: Mapping[int, Int64]

    @property
    def all(self) -> Int64:
        """Each once, in order."""
        return np.unique(np.concatenate([self.mistakes, self.hits, *self.by_class.values()]))


def choose(logits: Floats, labels: Int64, most: int) -> Chosen:
    """The surest mistakes, the least sure hits, and of each class two of both, until there are `most` images.

    Args:
        logits: (N, C).
    """
    right, sure = predicted_classes(logits) == labels, confidences(logits).round(DIGITS)
    mistakes, hits = _surest(~right, sure), _surest(right, -sure)
    chosen = {*mistakes[: min(MISTAKES, most)], *hits[: max(min(HITS, most - MISTAKES), 0)]}
    by_class: dict[int, Int64] = {}
    for label in _weakest_first(right, labels):
        own = labels == label
        some = np.concatenate([_surest(~right & own, sure)[:OF_EACH], _surest(right & own, -sure)[:OF_EACH]])
        if len(chosen | {*some}) > most:
            break
        chosen |= {*some}
        by_class[label] = some
    return Chosen(mistakes[: min(MISTAKES, most)], hits[: max(min(HITS, most - MISTAKES), 0)], by_class)


def _surest(which: Any, sure: Float64) -> Int64:
    places = np.flatnonzero(which)
    return places[np.argsort(-sure[places], kind="stable")].astype(np.int64)


def _weakest_first(right: Any, labels: Int64) -> list[int]:
    present = np.unique(labels)
    recall = [right[labels == label].mean() for label in present]
    return [int(present[i]) for i in np.argsort(recall, kind="stable")]


def make(
    chosen: Chosen, model: "Classifier", test: Samples, logits: Floats, train: Samples, found: "TrainingImages",
    suspects: Int64, config: Mapping[str, Any], threads: int,
) -> Galleries:  # fmt: skip
    """Asks the model why, and puts everything together.

    Args:
        model: the fine-tuned one, in evaluation mode.
        found: its `nearest` are of `chosen.mistakes`.
    """
    from stages.evaluation.evaluators.cam import heat_maps

    classes: Sequence[str] = config["classes"]
    predicted, sure, places = predicted_classes(logits), confidences(logits), chosen.all
    asked = heat_maps(
        model, test.at(places), predicted[places], image_size=config["image_size"], resize=config["resize"],
        threads=threads,
    )  # fmt: skip
    neighbours = {
        int(place): [
            Neighbour(train.key[i], classes[int(train.label[i])], jpeg_thumbnail(train.jpeg(int(i)))) for i in near
        ]
        for place, near in zip(chosen.mistakes, found.nearest, strict=True)
    }
    pictures = {
        int(place): Picture(
            test.key[place], classes[int(test.label[place])], classes[predicted[place]], float(sure[place]),
            thumbnail(seen), thumbnail(heat), neighbours.get(int(place), ()),
        )
        for place, (seen, heat) in zip(places, asked, strict=True)
    }  # fmt: skip
    return Galleries(
        mistakes=[pictures[int(i)] for i in chosen.mistakes],
        hits=[pictures[int(i)] for i in chosen.hits],
        by_class={classes[label]: [pictures[int(i)] for i in some] for label, some in chosen.by_class.items()},
        suspects=[
            Suspect(
                train.key[i], classes[int(train.label[i])], classes[int(found.suggested[i])], float(found.own[i]),
                float(found.other[i]), jpeg_thumbnail(train.jpeg(int(i))),
            )
            for i in suspects[:SUSPECTS]
        ],
    )  # fmt: skip
