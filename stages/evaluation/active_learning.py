"""Which unlabelled images would teach most: those that the model is unsure of, and no two of them alike.

In the manner of Zhdanov 2019 ("Diverse mini-batch Active Learning", arXiv:1902.05742): the most unsure images are kept
as candidates while the delivery streams by, ten for each that is asked for, so that only their features are in memory:
800 MB for a queue of 10,000 at 2,048 dimensions, however large the delivery. Among these the queue is drawn with
k-means++ seeding, as BADGE draws its batches (Ash et al. 2020, arXiv:1906.03671), weighted by uncertainty and greedy
(Arthur & Vassilvitskii 2007, section 5): plain seeding comes back to a picture of which there are many copies, and
farthest-first traversal (CoreSet, Sener & Savarese 2018) begins with what is like nothing else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.runtime.command import StageError
from stages.training.networks.devices import Compute
from stages.training.networks.models import Classifier

Floats = npt.NDArray[np.floating]
Int64 = npt.NDArray[np.int64]

CANDIDATES = 10
"""For each image asked for: Zhdanov's beta."""
SAME = 1e-5
"""Squared distance of unit vectors below which two are one: half precision tells them no further apart."""


@dataclass(frozen=True)
class Candidates:
    """Images by their place among all that were asked, with what the model said."""

    place: Int64
    """(N,)"""
    uncertainty: npt.NDArray[np.float32]
    """(N,) in 0-1: 1 less the margin between the two best probabilities."""
    classes: Int64
    """(N, 2) class ids of the two."""
    probabilities: npt.NDArray[np.float32]
    """(N, 2), best first."""
    features: npt.NDArray[np.float16]
    """(N, D) of length 1: what the head sees."""

    def __len__(self) -> int:
        return len(self.place)

    def at(self, rows: Int64) -> "Candidates":
        """Those rows, in this order."""
        return Candidates(
            self.place[rows], self.uncertainty[rows], self.classes[rows], self.probabilities[rows], self.features[rows]
        )

    def most_unsure(self, most: int) -> "Candidates":
        """At most so many, the most unsure first; of equally unsure ones, the earlier."""
        return self.at(np.lexsort((self.place, -self.uncertainty))[:most])


def most_unsure(model: Classifier, images: Iterable[Tensor], most: int, compute: Compute) -> Candidates:
    """Asks the model about all images, and keeps the most unsure ones.

    The margin, best against second best, and not the entropy: with many classes entropy is made of the tail, and ranks
    an image with no serious rival above one that is torn between two (Joshi et al. 2009, "Multi-class active learning
    for image classification").

    Args:
        model: on the device, in evaluation mode, of two classes or more.
        images: batches (n, 3, S, S) uint8 on the device, in order of their places.
        most: how many are kept; twice as many are in memory, and one batch.

    Raises:
        StageError: the model gives what is not a number.
    """
    kept: list[Candidates] = []
    for each in _asked(model, images, compute):
        kept.append(each)
        if sum(map(len, kept)) >= 2 * most:
            kept = [_joined(kept).most_unsure(most)]
    return _joined(kept).most_unsure(most)


def _asked(model: Classifier, images: Iterable[Tensor], compute: Compute) -> Iterator[Candidates]:
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    place = 0
    try:
        with torch.inference_mode():
            for batch in images:
                with compute.autocast():
                    logits = model(batch)
                yield _said(logits, seen.pop().flatten(1).float(), place)
                place += len(batch)
    finally:
        hook.remove()


def _said(logits: Tensor, features: Tensor, place: int) -> Candidates:
    if not (logits.isfinite().all() and features.isfinite().all()):
        raise StageError(
            "models/finetuned gives what is not a number; its weights are damaged or its training diverged"
        )
    best, classes = logits.double().softmax(dim=1).topk(2, dim=1)
    return Candidates(
        place=np.arange(place, place + len(logits)),
        uncertainty=(1 - (best[:, 0] - best[:, 1])).float().cpu().numpy(),
        classes=classes.cpu().numpy(),
        probabilities=best.float().cpu().numpy(),
        features=torch.nn.functional.normalize(features, dim=1).half().cpu().numpy(),
    )


def _joined(parts: list[Candidates]) -> Candidates:
    return Candidates(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("place", "uncertainty", "classes", "probabilities", "features")
        )
    )


def diverse(features: Floats, weights: Floats, count: int, seed: int) -> Int64:
    """Rows in the order in which greedy weighted k-means++ draws them: at most `count`, none twice.

    The first has the largest weight. For each next one, 2 + ln(count) are drawn with chances proportional to weight
    times squared distance to the nearest taken so far, and the one is taken that leaves least of the sum of these. So
    neither what looks like something taken already nor what looks like nothing else comes soon. Fewer than `count`
    where all that is left has no weight, or is what was taken.

    Args:
        features: (N, D) of length 1.
        weights: (N,), 0 or more.
    """
    points, weights = features.astype(np.float32), weights.astype(np.float64)
    generator = np.random.default_rng(seed)
    tries = 2 + int(np.log(count))
    taken: list[int] = []
    nearest, mass = np.full(len(points), 4.0), weights  # no two unit vectors are further apart
    while len(taken) < count and mass.sum() > 0:
        rows = _drawn(mass, tries, generator) if taken else np.array([weights.argmax()])
        left = np.minimum(nearest[:, None], _squared_distances(points, rows))
        best = int((weights @ left).argmin())
        taken.append(int(rows[best]))
        nearest = left[:, best]
        mass = weights * nearest
    return np.array(taken, np.int64)


def _drawn(mass: Floats, tries: int, generator: np.random.Generator) -> Int64:
    # Among those with any mass only: the sum may be rounded beyond the last of them.
    (rows,) = np.nonzero(mass)
    ends = np.cumsum(mass[rows])
    return rows[np.minimum(np.searchsorted(ends, generator.random(tries) * ends[-1], side="right"), len(rows) - 1)]


def _squared_distances(points: npt.NDArray[np.float32], rows: Int64) -> Floats:
    """(N, R) of unit vectors to some of them; 0 to what is the same."""
    squared = 2 - 2 * (points @ points[rows].T).astype(np.float64)
    squared[rows, np.arange(len(rows))] = 0
    return np.where(squared > SAME, squared, 0)
