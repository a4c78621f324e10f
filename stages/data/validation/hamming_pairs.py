"""All pairs of 64-bit hashes within a Hamming distance, without comparing all pairs.

Multi-index hashing, after Norouzi, Punjani & Fleet 2012, "Fast search in Hamming space with multi-index hashing". The
bits are divided into `distance + equal` substrings. Two hashes that differ in at most `distance` bits agree on at least
`equal` of the substrings. There is a table for every choice of `equal` substrings; its candidates are the pairs that
agree on all of these.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

BITS = 64
MAX_CANDIDATES = 20_000_000_000
"""ImageNet has a hundredth of it. With more, the hashes do not tell the images apart at all."""


class TooManyCandidatesError(Exception):
    """More than `MAX_CANDIDATES` pairs of hashes would be compared."""


class Table(NamedTuple):
    """Pairs of hashes that agree on the bits `key`, and differ somewhere in each mask of `different`.

    The latter are the other substrings in front of the last one of the key. So each pair is in one table only, that of
    the first substrings on which it agrees.
    """

    key: int
    different: tuple[int, ...]


def pairs_within(hashes: np.ndarray, distance: int, ignored: np.ndarray, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i < j) of hashes at most `distance` bits apart, in no particular order.

    Args:
        hashes: (N,) uint64, no two the same.
        distance: in bits.
        ignored: (N,) bool; pairs of two such hashes are left out, at no cost.
        workers: how many threads compare; NumPy releases the interpreter's lock meanwhile.

    Returns:
        Positions (P,) and (P,), int64.

    Raises:
        TooManyCandidatesError: the search would take hours.
    """
    if distance == 0 or len(hashes) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)

    def search(table: Table) -> tuple[np.ndarray, int]:
        return _pairs_in_table(hashes, ignored, table, distance)

    tables = list(_tables(distance, _equal_substrings(len(hashes), distance)))
    pairs, compared = [np.empty((0, 2), np.int64)], 0
    with ThreadPoolExecutor(workers) as pool:
        # As many tables at a time as there are threads, so that an exceeded budget ends it soon.
        for start in range(0, len(tables), workers):
            for found, candidates in pool.map(search, tables[start : start + workers]):
                compared += candidates
                _check_budget(compared)
                pairs.append(found)
    one, other = np.concatenate(pairs).T
    return np.minimum(one, other), np.maximum(one, other)


def _tables(distance: int, equal: int) -> Iterator[Table]:
    """Every choice of `equal` substrings. A substring is every n-th bit, as neighbouring bits are correlated."""
    count = distance + equal
    substrings = [sum(1 << bit for bit in range(first, BITS, count)) for first in range(count)]
    for chosen in combinations(range(count), equal):
        different = (mask for number, mask in enumerate(substrings[: chosen[-1]]) if number not in chosen)
        yield Table(sum(substrings[number] for number in chosen), tuple(different))


def _equal_substrings(count: int, distance: int) -> int:
    """The `equal` that costs least: sorting a table costs `count`, comparing costs its candidates.

    Real hashes are not uniform: candidates are estimated as if only 0.7 of the bits were free.
    """

    def cost(equal: int) -> float:
        tables, bits = comb(distance + equal, equal), 0.7 * BITS * equal / (distance + equal)
        return tables * (20.0 * count + count * count / 2 / 2**bits)

    return min(range(1, 6), key=cost)


def _pairs_in_table(hashes: np.ndarray, ignored: np.ndarray, table: Table, distance: int) -> tuple[np.ndarray, int]:
    """Pairs (P, 2) of this table that are within `distance`; and how many candidates were compared."""
    # The lowest bit outside the key is rotated to the very end: there it sorts ignored hashes first among equal keys.
    spare = (~table.key & -~table.key).bit_length() - 1
    key = _rotated_right(hashes & np.uint64(table.key), spare)
    order = np.argsort(np.where(ignored, key, key | np.uint64(1)))
    key, wanted, ordered = key[order], ~ignored[order], hashes[order]
    pairs, compared = [np.empty((0, 2), np.int64)], 0
    for one, other in _candidates(key, wanted):
        compared += len(one)
        _check_budget(compared)
        changed = ordered[one] ^ ordered[other]
        near = np.bitwise_count(changed) <= distance
        one, other, changed = one[near], other[near], changed[near]
        of_table = np.ones(len(one), dtype=bool)
        for mask in table.different:
            of_table &= (changed & np.uint64(mask)) != 0
        pairs.append(np.stack([order[one[of_table]], order[other[of_table]]], axis=1))
    return np.concatenate(pairs), compared


def _candidates(key: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions in each run of equal keys, the second one wanted: neighbours, then next but one, and so on.

    In a run the hashes that are not wanted come first.
    """
    second, step = np.flatnonzero(wanted), 1
    while True:
        second = second[second >= step]
        second = second[key[second] == key[second - step]]
        if not second.size:
            return
        yield second - step, second
        step += 1


def _rotated_right(values: np.ndarray, by: int) -> np.ndarray:
    return (values >> np.uint64(by)) | (values << np.uint64(BITS - by)) if by else values


def _check_budget(candidates: int) -> None:
    if candidates > MAX_CANDIDATES:
        raise TooManyCandidatesError
