"""The columns that expectations of images check, computed from the facts."""

import numpy as np
import pandas as pd

LEAST_SPREAD = {"resolution": 1.0, "brightness": 16.0}
"""The middle half of a batch counts as this wide at least, in octaves and in levels: where all images have one size,
one that is a pixel wider is no outlier."""
FEWEST_FOR_QUARTILES = 20


def with_measures(facts: pd.DataFrame) -> pd.DataFrame:
    """The columns that expectations of single images check, one row per image.

    What is unknown (sizes of broken headers) is NaN, and NaN passes: another expectation fails there.
    """
    width, height = (facts[side].to_numpy(np.float64) for side in ("width", "height"))
    known = (width > 0) & (height > 0)
    short, long = np.minimum(width, height), np.maximum(width, height)
    return pd.DataFrame(
        {
            **{name: facts[name].to_numpy() for name in ("bytes", "format", "decodes", "contrast")},
            "pixels": np.where(known, width * height, np.nan),
            "short_side": np.where(known, short, np.nan),
            "aspect": np.divide(long, short, out=np.full(len(facts), np.nan), where=known),
        }
    )


def outlying(images: pd.DataFrame) -> pd.DataFrame:
    """How far each image lies beyond the middle half of its own batch, in widths of that half; 0 within it.

    Tukey's fences (1977): quartiles do not move with the outliers that they are to find.

    Args:
        images: sound ones, columns arrival, width, height, brightness.

    Returns:
        Columns resolution_outlying and brightness_outlying, float64. All 0 in batches of fewer than 20 images.
    """
    pixels = images["width"].to_numpy(np.float64) * images["height"].to_numpy(np.float64)
    facts = {"resolution": np.log2(np.maximum(pixels, 1)), "brightness": images["brightness"].to_numpy(np.float64)}
    beyond = {f"{fact}_outlying": np.zeros(len(images)) for fact in facts}
    arrival = images["arrival"].to_numpy()
    for batch in np.unique(arrival):
        rows = arrival == batch
        if rows.sum() < FEWEST_FOR_QUARTILES:
            continue
        for fact, values in facts.items():
            low, high = np.quantile(values[rows], [0.25, 0.75])
            spread = max(high - low, LEAST_SPREAD[fact])
            distance = np.maximum(low - values[rows], values[rows] - high)
            beyond[f"{fact}_outlying"][rows] = np.maximum(distance, 0) / spread
    return pd.DataFrame(beyond, index=images.index)
