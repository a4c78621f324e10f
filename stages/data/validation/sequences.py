"""Frames of one sequence, told by names and looks: numbered images of which neighbours look alike, as a camera gives.

Merely numbered files do not: of ImageNet, images next to each other differ as much as any two of their class.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.validation.hamming_pairs import BITS

NUMBERED = r"^[^/]*/[^/]*/[^/]*/(?P<prefix>.*?)(?P<number>\d{1,18})(?P<rest>\D*)$"
"""Of a key: the last number of the name, and what stands before it."""
LARGE = 20
"""Images of one prefix that are compared among themselves; smaller ones (a few views of a thing) with their class."""
PAIRS = 10
"""Neighbours that a judgement needs."""
RATIO, SIGNIFICANCE = 0.85, 5.0
"""Neighbours differ by less than this share of what any two do, by so many standard errors. In Imagenette and Tiny
ImageNet the share is at least 0.98 (and 2.7 standard errors at most); in CamVid, a frame a second, at most 0.75."""


def sequence_table(images: pd.DataFrame) -> pd.DataFrame:
    """What looks like sequences, a row per batch that has some whose frames fall on several sides of a split.

    Args:
        images: facts of all, with arrival and split.

    Returns:
        Columns arrival, sequences, frames, first and second (names of two neighbours), apart and apart_by_chance (mean
        Hamming distance of neighbours and of any two, of 64 bits), advice (what to write).
    """
    rows = images.loc[images["decodes"] & (images["group"] == ""), ["arrival", "key", "class_name", "hash", "split"]]
    found = [{"arrival": arrival, **of} for arrival, part in rows.groupby("arrival") if (of := _sequences(part))]
    return pd.DataFrame(found, columns=["arrival", *COLUMNS])


BY_PREFIX = "`?group=^(.*\\D)\\d+` of the source groups by what stands before the last number"
ONE_PREFIX = "`?group=(\\d+)\\d\\d\\D*$` of the source keeps each hundred of them together"
COLUMNS = ["sequences", "frames", "first", "second", "apart", "apart_by_chance", "advice"]


def _sequences(rows: pd.DataFrame) -> dict[str, object]:
    """Of one batch; empty where there is none."""
    found = [block for block in _blocks(rows) if is_sequence(block)]
    if not found:
        return {}
    frames = pd.concat(found)
    names = [key.split("/", 3)[3] for key in frames["key"].iloc[:2]]
    apart, chance = zip(*map(_distances, found), strict=True)
    return {
        "sequences": len(found),
        "frames": len(frames),
        "first": names[0],
        "second": names[1],
        "apart": float(np.concatenate(apart).mean()),
        "apart_by_chance": float(np.average(chance, weights=list(map(len, found)))),
        "advice": BY_PREFIX if frames["prefix"].nunique() > 1 else ONE_PREFIX,
    }


def _blocks(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Numbered images in the order of their numbers: those of one long prefix, or of a class's short ones."""
    parts = pc.extract_regex(pa.array(rows["key"], pa.string()), NUMBERED)
    rows, parts = rows[parts.is_valid().to_numpy(zero_copy_only=False)], parts.drop_null()
    prefix, number = pc.struct_field(parts, "prefix"), pc.struct_field(parts, "number").cast(pa.int64())
    rows = rows.assign(prefix=prefix.to_pandas().to_numpy(), number=number.to_numpy())
    rows = rows.sort_values(["class_name", "prefix", "number", "key"])
    size = rows.groupby(["class_name", "prefix"])["key"].transform("size")
    rows["block"] = rows["prefix"].where(size >= LARGE, "")
    for _, block in rows.groupby(["class_name", "block"]):
        if len(block) > PAIRS:
            yield block


def is_sequence(block: pd.DataFrame) -> bool:
    """Whether neighbours in a block look more alike than any two, and some are on two sides of a split."""
    near, chance = _distances(block)
    split = block["split"].to_numpy()
    if len(near) < PAIRS or not (split[1:] != split[:-1])[_neighbours(block)].any():
        return False
    error = max(float(near.std(ddof=1)), 0.5) / np.sqrt(len(near))  # distances are whole numbers
    return bool(near.mean() <= RATIO * chance and chance - near.mean() >= SIGNIFICANCE * error)


def _neighbours(block: pd.DataFrame) -> np.ndarray:
    """Which images have the same prefix as the next one, (N - 1,) bool."""
    prefix = block["prefix"].to_numpy()
    return prefix[1:] == prefix[:-1]


def _distances(block: pd.DataFrame) -> tuple[np.ndarray, float]:
    """Hamming distances of neighbours, (P,), and the mean one of any two images."""
    hashes = block["hash"].to_numpy(np.uint64)
    near = np.bitwise_count(hashes[1:] ^ hashes[:-1])[_neighbours(block)].astype(np.float64)
    ones = np.array([int((hashes >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(BITS)], dtype=np.float64)
    return near, float((ones * (len(hashes) - ones)).sum() * 2 / (len(hashes) * (len(hashes) - 1)))
