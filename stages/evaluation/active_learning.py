"""Active learning: which unlabelled images to label first. Those the model is unsure of, and no two of them alike.

After Zhdanov 2019 ("Diverse mini-batch Active Learning", arXiv:1902.05742). The images are read once; the most unsure
ones are kept as candidates, ten per image of the queue. Only their features are in memory: 800 MB for a queue of 10,000
at 2,048 dimensions, however large the delivery. The queue is drawn from the candidates by k-means++ seeding, as BADGE
draws its batches (Ash et al. 2020, arXiv:1906.03671), weighted by uncertainty and greedy (Arthur & Vassilvitskii 2007,
section 5). Plain seeding would draw an image with many copies again; farthest-first traversal (CoreSet, Sener &
Savarese 2018) would begin with outliers.
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
"""Candidates per image of the queue: Zhdanov's beta."""
SAME = 1e-5
"""Unit vectors with a smaller squared distance count as the same: half precision does not separate them."""


@dataclass(frozen=True)
class Candidates:
    """Unlabelled images with the predictions of the model."""

    place: Int64
    """(N,) index among all images of the pool."""
    uncertainty: npt.NDArray[np.float32]
    """(N,) in 0-1: 1 - (best probability - second best)."""
    classes: Int64
    """(N, 2) class ids of the two."""
    probabilities: npt.NDArray[np.float32]
    """(N, 2), best first."""
    features: npt.NDArray[np.float16]
    """(N, D) of length 1: the input of the head."""

    def __len__(self) -> int:
        return len(self.place)

    def at(self, rows: Int64) -> "Candidates":
        """Those rows, in this order."""
        return Candidates(
            self.place[rows], self.uncertainty[rows], self.classes[rows], self.probabilities[rows], self.features[rows]
        )

    def most_unsure(self, most: int) -> "Candidates":
        """The first `most` rows, the most unsure first; of equally unsure ones, the earlier."""
        return self.at(np.lexsort((self.place, -self.uncertainty))[:most])


def most_unsure(model: Classifier, images: Iterable[Tensor], most: int, compute: Compute) -> Candidates:
    """Predicts all images and keeps the most unsure ones.

    Uncertainty is the margin between the best two classes, not the entropy. With many classes the tail decides the
    entropy, which ranks an image without a serious rival class above one between two classes (Joshi et al. 2009,
    "Multi-class active learning for image classification").

    Args:
        model: on the device, in evaluation mode, of two classes or more.
        images: batches (n, 3, S, S) uint8 on the device, in the order of the pool.
        most: how many are kept; twice as many, and one batch, are in memory.

    Raises:
        StageError: the model gives NaN or infinity.
    """
    kept: list[Candidates] = []
    for batch in _predicted(model, images, compute):
        kept.append(batch)
        if sum(map(len, kept)) >= 2 * most:
            kept = [_joined(kept).most_unsure(most)]
    return _joined(kept).most_unsure(most)


def _predicted(model: Classifier, images: Iterable[Tensor], compute: Compute) -> Iterator[Candidates]:
    start = 0
    with torch.inference_mode():
        for batch in images:
            with compute.autocast():
                features, logits = model.features_and_logits(batch)
            yield _candidates(features, logits, start)
            start += len(batch)


def _candidates(features: Tensor, logits: Tensor, start: int) -> Candidates:
    if not (logits.isfinite().all() and features.isfinite().all()):
        raise StageError(
            "models/finetuned gives what is not a number; its weights are damaged or its training diverged"
        )
    best, classes = logits.double().softmax(dim=1).topk(2, dim=1)
    return Candidates(
        place=np.arange(start, start + len(logits)),
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

    The first row has the largest weight. For each next one, 2 + ln(count) rows are drawn with chances proportional to
    weight x squared distance to the nearest row taken; the one that leaves the smallest sum of these is taken. So
    neither copies of taken rows nor outliers come early. Fewer than `count` rows if the rest has no weight or equals
    rows taken.

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
    # Only rows with mass: the cumulated sum may be rounded beyond the last of them.
    (rows,) = np.nonzero(mass)
    ends = np.cumsum(mass[rows])
    return rows[np.minimum(np.searchsorted(ends, generator.random(tries) * ends[-1], side="right"), len(rows) - 1)]


def _squared_distances(points: npt.NDArray[np.float32], rows: Int64) -> Floats:
    """(N, R) squared distances of unit vectors to R of them; 0 to equal ones."""
    squared = 2 - 2 * (points @ points[rows].T).astype(np.float64)
    squared[rows, np.arange(len(rows))] = 0
    return np.where(squared > SAME, squared, 0)
