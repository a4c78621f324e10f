"""Which split an image falls into, and which label its class has: by content and order of arrival, never by chance."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from stages.params.split import Split

# Of two duplicates in a batch, the one whose split comes first stays: the evaluated one.
PRECEDENCE = ("test", "fresh", "val", "train")

# Hex digits of the sha256 that decide one question; each question has its own, so the answers are independent.
DIGITS = 15
QUESTIONS = {"test": 0, "val": 1, "fresh": 2}

_NIBBLE = np.zeros(256, dtype=np.uint64)
for _value, _digit in enumerate(b"0123456789abcdef"):
    _NIBBLE[_digit] = _value


def assign_splits(source_split: pd.Series, sha256: pd.Series, later_finetune: bool, limits: Split) -> np.ndarray:
    """The split of each image of one batch.

    Args:
        source_split: the split that the source has it in: train, val, test, or all (one pool).
        sha256: of the file, in hex.
        later_finetune: the batch is of role finetune and not the first one: it has a holdout of its own, `fresh`.
        limits: the fractions.

    Returns:
        (N,) objects: train, val, test or fresh.
    """
    source = source_split.to_numpy(dtype=object)
    present = set(pd.unique(source_split))
    if later_finetune:
        held_out, val, pool = np.zeros(len(source), bool), np.zeros(len(source), bool), np.ones(len(source), bool)
    elif "test" in present:
        held_out, val = source == "test", source == "val"
        pool = ~held_out & ~val
    else:  # the source's only holdout tests the model, it does not select it
        held_out, val = source == "val", np.zeros(len(source), bool)
        pool = ~held_out
    split = np.full(len(source), "train", dtype=object)
    split[held_out], split[val] = "test", "val"
    if later_finetune:
        pool &= ~_take(split, pool, sha256, "fresh", limits.fresh_fraction)
    elif not held_out.any():
        pool &= ~_take(split, pool, sha256, "test", limits.test_fraction)
    if not val.any():
        _take(split, pool, sha256, "val", limits.val_fraction)
    return split


def _take(split: np.ndarray, pool: np.ndarray, sha256: pd.Series, name: str, fraction: float) -> np.ndarray:
    """Marks `fraction` of `pool` as `name`; returns which."""
    taken = pool & (content_fractions(sha256, name) < fraction)
    split[taken] = name
    return taken


def content_fractions(sha256: pd.Series, question: str) -> np.ndarray:
    """A number in [0, 1) per image, (N,) float64, from its bytes and the question ("test", "val", "fresh") alone."""
    start = QUESTIONS[question] * DIGITS
    digits = np.asarray(sha256.tolist(), dtype="S64").view(np.uint8).reshape(len(sha256), 64)
    number = np.zeros(len(sha256), dtype=np.uint64)
    for position in range(start, start + DIGITS):
        number = number * np.uint64(16) + _NIBBLE[digits[:, position]]
    return number.astype(np.float64) / 16.0**DIGITS


def precedence(split: np.ndarray) -> np.ndarray:
    """(N,) int8: 0 for the split that stays against all others."""
    ranks = np.zeros(len(split), dtype=np.int8)
    for rank, name in enumerate(PRECEDENCE):
        ranks[split == name] = rank
    return ranks


def class_list(batches: Iterable[pd.Series]) -> list[str]:
    """Class names of one role, append-only: those of the first batch sorted, then each later batch's new ones sorted.

    Args:
        batches: class name of each image, a series a batch, in order of arrival; an empty name is no class.
    """
    names: list[str] = []
    for class_names in batches:
        names += sorted(set(pd.unique(class_names)) - set(names) - {""})
    return names


def labels(class_name: pd.Series, names: list[str]) -> np.ndarray:
    """(N,) int32: index in `names`; -1 where the name is not among them (unlabelled)."""
    return pd.Index(names, dtype=object).get_indexer(pd.Index(class_name, dtype=object)).astype(np.int32)
