"""The order of an epoch's training images."""

import numpy as np

from stages.data.shards.loading.samples.index import Int64, Samples


def epoch_order(samples: Samples, seed: int, epoch: int) -> Int64:
    """A new permutation of all samples, (N,), in which every batch is spread evenly over the whole epoch.

    Each batch's images are shuffled and laid at equal distances; merging them by position keeps every stretch of the
    epoch in the proportion of the whole, however small a batch is.
    """
    generator = np.random.default_rng([seed, epoch])
    position = np.empty(len(samples))
    for batch in range(len(samples.batch_names)):
        (members,) = np.nonzero(samples.batch == batch)
        position[generator.permutation(members)] = (np.arange(len(members)) + generator.random()) / max(len(members), 1)
    return np.argsort(position, kind="stable")
