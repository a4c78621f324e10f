"""Nearest training images: which ones are most similar to a test image, by the features of the fine-tuned model."""

import numpy as np

from stages.evaluation.inference import Floats32, unit

NEIGHBOURS = 3


class NearestImages:
    """The training images most similar to each of Q queries, by cosine similarity; of equals, the earlier ones.

    Args:
        queries: (Q, D) features.
    """

    def __init__(self, queries: Floats32) -> None:
        self.queries = unit(queries)
        self.indexes = np.empty((len(queries), 0), np.int64)
        """(Q, up to 3) among all images added so far, the most similar first."""
        self._similarity = np.empty((len(queries), 0), np.float32)

    def add(self, features: Floats32, start: int) -> None:
        """A batch of training images: features (n, D), the first of them at index `start`."""
        if not len(self.queries):
            return
        # Rounded: the last bits of a product differ with the size of the batch.
        similarity = np.round(self.queries @ unit(features).T, 5)
        indexes = np.broadcast_to(np.arange(start, start + len(features)), similarity.shape)
        all_indexes = np.concatenate([self.indexes, indexes], axis=1)
        all_similar = np.concatenate([self._similarity, similarity], axis=1)
        kept = np.argsort(-all_similar, axis=1, kind="stable")[:, :NEIGHBOURS]
        self.indexes = np.take_along_axis(all_indexes, kept, axis=1)
        self._similarity = np.take_along_axis(all_similar, kept, axis=1)
