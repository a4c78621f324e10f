"""A cold process: seconds from "torch is imported" to the first batch of training, checksums of the shards included.

`python -m bench.first_batch SHARD_SET` prints them; bench.loading starts it round by round.
"""

import sys
import time
from pathlib import Path

import torch


def main() -> None:
    """Loads one batch as the trainer does."""
    torch.set_num_threads(2)
    began = time.perf_counter()
    from stages.data.shards.loading.samples.index import read_samples
    from stages.data.shards.loading.train_loading import TrainLoader

    samples = read_samples([Path(sys.argv[1])], "train")
    loader = TrainLoader(samples, batch_size=64, min_crop_area=0.08, seed=1, threads=2, device="cpu")
    images, _ = next(loader.batches(epoch=1, start=0, image_size=224))
    assert images.shape[1:] == (3, 224, 224)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
