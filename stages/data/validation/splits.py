"""Which split an image falls into, and which label its class has: by content and order of arrival, never by chance.

What has to be drawn is drawn class by class, so that each has its share of test, val and fresh. Images of one group
(`?group=` of the source) go together, and where an earlier batch has the group, to the side that it has there.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import pandas as pd

from stages.data.validation.class_order import class_order
from stages.params.split import Split

# Of two duplicates in a batch, the one whose split comes first stays: the evaluated one.
PRECEDENCE = ("test", "fresh", "val", "train")

# Hex digits of the sha256 that decide one question; each question has its own, so the answers are independent.
DIGITS = 15
QUESTIONS = {"test": 0, "val": 1, "fresh": 2}
ENOUGH = 3
"""Images (or groups) of a class from which on it has one at least in each split that is drawn."""

_NIBBLE = np.zeros(256, dtype=np.uint64)
for _value, _digit in enumerate(b"0123456789abcdef"):
    _NIBBLE[_digit] = _value


def assign_splits(rows: pd.DataFrame, role: str, is_later: bool, limits: Split, known: pd.Series) -> np.ndarray:
    """The split of each image of one batch.

    Args:
        rows: source_split (train, val, test, or all: one pool), class_name, sha256 (hex), group (or empty), and
            `counts`: whether it counts towards a share, as damaged images and copies do not.
        role: of the batch.
        is_later: it is not the first of role finetune, and has a holdout of its own, `fresh`.
        limits: the fractions.
        known: the side of each group that earlier batches have, as `known_sides` gives it.

    Returns:
        (N,) objects: train, val, test or fresh.
    """
    source = rows["source_split"].to_numpy(dtype=object)
    # A source without test gives its val for it: its only holdout tests the model, it does not select it.
    test = source == ("test" if "test" in set(source) else "val")
    val = (source == "val") & ~test
    if is_later:
        test, val = np.zeros(len(source), bool), np.zeros(len(source), bool)
    holdout = "fresh" if is_later else "test"
    split = np.full(len(source), "train", dtype=object)
    split[test], split[val] = "test", "val"
    side = rows["group"].map(known).astype(object).to_numpy()
    # The splits that a target task comes with are not changed. Pretraining keeps off what that is tested on.
    follows = ~test & ~val & ((side == "train") | (role == "pretrain" or not (test.any() or val.any())))
    split[follows & (side == "val")], split[follows & (side == "test")] = "val", holdout
    free = ~test & ~val & ~(follows & np.isin(side, SIDES))
    draw = _Draw(rows[free])
    if not test.any():
        fraction = limits.fresh_fraction if is_later else limits.test_fraction
        draw.take(holdout, fraction, keep=1 if val.any() or not limits.val_fraction else 2)
    if not val.any():
        draw.take("val", limits.val_fraction, keep=1)
    split[free] = draw.split
    return split


SIDES = ("val", "test", "train")
"""What a group can be bound to, `test` standing for fresh too; where it is in several, the last one counts."""


def known_sides(groups: Iterable[str], splits: Iterable[str]) -> pd.Series:
    """The side of each group, by its name; `train` where any image was trained on, else `test`, else `val`.

    Args:
        groups: of each image that is in one.
        splits: of each.
    """
    rank = {side: number for number, side in enumerate(SIDES)} | {"fresh": SIDES.index("test")}
    known: dict[str, int] = {}
    for group, split in zip(groups, splits, strict=True):
        known[group] = max(known.get(group, 0), rank[split])
    return pd.Series({group: SIDES[number] for group, number in known.items()}, dtype=object)


class _Draw:
    """Draws splits from images that no one has assigned: in units, the images of a group or of the same bytes."""

    def __init__(self, rows: pd.DataFrame) -> None:
        identity = rows["sha256"].to_numpy(dtype=object).copy()
        grouped = (rows["group"] != "").to_numpy()
        identity[grouped] = [hashlib.sha256(f"group\0{name}".encode()).hexdigest() for name in rows["group"][grouped]]
        self._unit, identities = pd.factorize(identity)
        self._identities = pd.Series(identities, dtype=object)
        self._of_unit = np.full(len(identities), "train", dtype=object)
        counted = rows["counts"].to_numpy(dtype=bool)
        pairs = pd.DataFrame({"class": rows["class_name"].to_numpy()[counted], "unit": self._unit[counted]})
        sizes = pairs.groupby(["class", "unit"], sort=True).size().rename("size").reset_index()
        # Rare classes choose first: a group may have images of several.
        classes = [part for _, part in sizes.groupby("class", sort=True)]
        self._classes = sorted(((part["unit"].to_numpy(), part["size"].to_numpy()) for part in classes), key=_units)

    @property
    def split(self) -> np.ndarray:
        """(N,) objects, of each row."""
        return self._of_unit[self._unit]

    def take(self, name: str, share: float, keep: int) -> None:
        """Puts about `share` of the images of each class that are still in train into the split `name`.

        Args:
            name: of the split, and of the question that orders the units.
            share: of the images that count.
            keep: units of each class that stay in train.
        """
        if not share:
            return
        fraction = content_fractions(self._identities, name)
        was_free = self._of_unit == "train"
        for unit, size in self._classes:
            free = np.flatnonzero(self._of_unit[unit] == "train")
            free = free[np.argsort(fraction[unit[free]], kind="stable")]
            before = size[was_free[unit]].sum()
            have, target = before - size[free].sum(), share * before
            taken = fitting(size[free].tolist(), have, target, len(free) - keep, len(unit) >= ENOUGH)
            self._of_unit[unit[free[taken]]] = name


def _units(of_class: tuple[np.ndarray, np.ndarray]) -> int:
    return len(of_class[0])


def fitting(sizes: list[int], have: int, target: float, most: int, is_enough: bool) -> list[int]:
    """Which units to take, so that together they come close to a target.

    Args:
        sizes: images of each unit; the first ones are taken first.
        have: images that are there before.
        target: images that should be there.
        most: how many units may be taken.
        is_enough: whether there must be one at least: the smallest one, where none fits.
    """
    taken: list[int] = []
    empty = not have
    for number, size in enumerate(sizes):
        if len(taken) >= most or have >= target:
            break
        if have + size / 2 <= target:
            taken.append(number)
            have += size
    if empty and not taken and is_enough and most > 0:
        return [min(range(len(sizes)), key=sizes.__getitem__)]
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


def class_list(batches: Iterable[tuple[pd.Series, bool]]) -> list[str]:
    """Class names of one role, append-only: those of the first batch sorted, then each later batch's new ones sorted.

    Args:
        batches: class name of each image (empty: none), and whether an older version ingested the batch: its list is
            in the order of text (0, 1, 10, 2), as it was made, and not of numbers; a batch each, in order of arrival.
    """
    names: list[str] = []
    for class_names, is_old in batches:
        new = set(pd.unique(class_names)) - set(names) - {""}
        names += sorted(new) if is_old else class_order(new)
    return names


def labels(class_name: pd.Series, names: list[str]) -> np.ndarray:
    """(N,) int32: index in `names`; -1 where the name is not among them (unlabelled)."""
    return pd.Index(names, dtype=object).get_indexer(pd.Index(class_name, dtype=object)).astype(np.int32)
