"""One pass over the training images: class means, images that look mislabelled, and which were nearest to a mistake.

There may be a million of them, so features are used as they come and not kept.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.data.shards.loading.samples.index import Samples
from stages.evaluation.inference import Floats32, Int64, add_directions, answers, unit
from stages.evaluation.metrics import log_probabilities
from stages.runtime.progress import progress
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier

NEIGHBOURS = 3


@dataclass(frozen=True)
class TrainingImages:
    """What was found among N training images of C classes; D numbers are a feature, Q images were asked about."""

    means: Floats32
    """(C, D) mean direction of each class in the backbone's features; zeros for a class without images."""
    own: npt.NDArray[np.float64]
    """(N,) probability that the fine-tuned model gives to the label."""
    other: npt.NDArray[np.float64]
    """(N,) the largest that it gives to another class."""
    suggested: Int64
    """(N,) that class."""
    nearest: Int64
    """(Q, up to 3) the training images most like each that was asked about, the most alike first."""


def look(
    train: Samples, finetuned: Classifier, backbone: Classifier, asked: Floats32, classes: int, *, image_size: int,
    resize: int, batch_size: int, compute: Compute,
) -> TrainingImages:  # fmt: skip
    """Goes through the labelled training images once.

    Args:
        asked: (Q, D) the fine-tuned model's features of the images whose neighbours are wanted.
    """
    own, other = np.empty(len(train)), np.empty(len(train))
    suggested = np.empty(len(train), np.int64)
    nearest = _Nearest(asked)
    sums: Floats32 | None = None
    start = 0
    batches = answers(
        train, {"finetuned": finetuned, "backbone": backbone}, image_size=image_size, resize=resize,
        batch_size=batch_size, compute=compute,
    )  # fmt: skip
    for batch in progress(batches, -(-len(train) // batch_size), "training images"):
        features, logits = batch["finetuned"]
        rows = slice(start, start + len(logits))
        own[rows], other[rows], suggested[rows] = _probabilities(logits, train.label[rows])
        nearest.look(features, start)
        upstream = batch["backbone"].features
        sums = np.zeros((classes, upstream.shape[1]), np.float32) if sums is None else sums
        add_directions(sums, upstream, train.label[rows])
        start = rows.stop
    means = unit(sums) if sums is not None else np.zeros((classes, 0), np.float32)
    return TrainingImages(means, own, other, suggested, nearest.places)


def _probabilities(logits: Floats32, labels: Int64) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Int64]:
    """Of the label, of the likeliest other class, and that class."""
    probabilities = np.exp(log_probabilities(logits))
    rows = np.arange(len(labels))
    own = probabilities[rows, labels].copy()
    probabilities[rows, labels] = -1
    suggested = probabilities.argmax(axis=1)
    return own, np.maximum(probabilities[rows, suggested], 0), suggested


class _Nearest:
    """The training images most like each of Q, by cosine similarity; the earlier of equals."""

    def __init__(self, asked: Floats32) -> None:
        self.asked = unit(asked)
        self.places = np.empty((len(asked), 0), np.int64)
        self.similarity = np.empty((len(asked), 0), np.float32)

    def look(self, features: Floats32, start: int) -> None:
        """At a batch, whose first image is the `start`th."""
        if not len(self.asked):
            return
        # Rounded: the last bits of a product differ with the size of the batch.
        similarity = np.round(self.asked @ unit(features).T, 5)
        places = np.broadcast_to(np.arange(start, start + len(features)), similarity.shape)
        all_places = np.concatenate([self.places, places], axis=1)
        all_similar = np.concatenate([self.similarity, similarity], axis=1)
        kept = np.argsort(-all_similar, axis=1, kind="stable")[:, :NEIGHBOURS]
        self.places = np.take_along_axis(all_places, kept, axis=1)
        self.similarity = np.take_along_axis(all_similar, kept, axis=1)


def suspects(found: TrainingImages, labels: Int64, classes: int) -> Int64:
    """Training images that look mislabelled, the most suspicious first: confident learning (Northcutt et al. 2021).

    A class's threshold is the mean probability that its own images get. An image is suspect whose label gets less than
    its threshold while another class gets more than that one's. They are ranked by how unlikely their label is.

    Args:
        labels: (N,) as given.

    Returns:
        (K,) places in N.
    """
    counts = np.bincount(labels, minlength=classes)
    thresholds = np.divide(
        np.bincount(labels, found.own, minlength=classes), counts, out=np.full(classes, np.inf), where=counts > 0
    )
    suspect = (found.own < thresholds[labels]) & (found.other >= thresholds[found.suggested])
    places = np.flatnonzero(suspect)
    return places[np.argsort(np.round(found.own[places], 6), kind="stable")].astype(np.int64)
