"""Sequences: frames are told by names and looks together, and merely numbered files are not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages.data.validation.sequences import sequence_table

RNG = np.random.default_rng(0)


def _video(count: int, changed: int = 4) -> list[int]:
    """Hashes of frames: each differs from the one before in a few bits."""
    hashes = [int(RNG.integers(2**63))]
    for _ in range(count - 1):
        hashes.append(hashes[-1] ^ int(np.bitwise_or.reduce(1 << RNG.integers(0, 63, changed))))
    return hashes


def _photos(count: int) -> list[int]:
    return [int(each) for each in RNG.integers(2**63, size=count)]


def _rows(names: list[str], hashes: list[int], **columns: Any) -> pd.DataFrame:
    split = np.where(np.arange(len(names)) % 5 == 0, "test", "train")
    rows = pd.DataFrame({"key": [f"new/all/{name}" for name in names], "hash": np.array(hashes, np.uint64)})
    rows["class_name"] = [name.partition("/")[0] for name in names]
    values: dict[str, Any] = {"arrival": 0, "split": split, "decodes": True, "group": ""} | columns
    return rows.assign(**values)


def _named(pattern: str, count: int) -> list[str]:
    return [pattern.format(number) for number in range(count)]


@pytest.mark.parametrize(
    "names",
    [
        _named("/frame_{:04d}.jpg", 60),
        _named("/frame_{}.jpg", 60),  # 10 comes after 9
        _named("walk/img_000{:03d}.png", 60),
        [f"/{prefix}{30 * number:05d}.jpg" for prefix in ("0001TP_", "Seq05VD_f") for number in range(30)],
        _named("/2024-05-03_12-00-{:02d}.jpg", 60),
        _named("/cam1_{:05d}_left.jpg", 60),
    ],
)
def test_numbered_frames_of_which_neighbours_look_alike_are_a_sequence(names: list[str]) -> None:
    (found,) = sequence_table(_rows(names, _video(60))).to_dict("records")
    assert found["frames"] == 60 and found["apart"] < 5 < 15 < found["apart_by_chance"]
    assert found["first"] == names[0].partition("/")[2] and "?group=" in found["advice"]


def test_a_few_views_of_each_thing_are_told_too() -> None:
    names = [f"goods/sku{thing}_{view}.jpg" for thing in range(20) for view in range(4)]
    assert len(sequence_table(_rows(names, [each for _ in range(20) for each in _video(4)]))) == 1


def _same_scene(count: int) -> list[int]:
    """Of one camera: all differ little, neighbours no less than others."""
    return [_ONE ^ int(np.bitwise_or.reduce(1 << RNG.integers(0, 63, 5))) for _ in range(count)]


_ONE = int(RNG.integers(2**63))


@pytest.mark.parametrize("hashes", [_photos, _same_scene])
@pytest.mark.parametrize("pattern", ["n01440764/n01440764_{}.JPEG", "/{:06d}.png", "a/img ({}).jpg"])
def test_merely_numbered_files_are_none(hashes: Callable[[int], list[int]], pattern: str) -> None:
    assert sequence_table(_rows(_named(pattern, 300), hashes(300))).empty


@pytest.mark.parametrize(
    "change", [{"group": "walk"}, {"decodes": False}, {"split": "train"}], ids=["grouped", "damaged", "in one split"]
)
def test_what_needs_no_group_is_not_noted(change: dict[str, Any]) -> None:
    rows = _rows(_named("/frame_{:04d}.jpg", 60), _video(60))
    assert len(sequence_table(rows)) == 1
    assert sequence_table(rows.assign(**change)).empty


def test_names_without_an_order_and_a_few_frames_are_none() -> None:
    hashes = _video(60)
    assert sequence_table(_rows([f"/{RNG.bytes(8).hex()}.png" for _ in range(60)], hashes)).empty
    assert sequence_table(_rows(_named("/frame_{}.jpg", 8), hashes[:8])).empty
    assert sequence_table(_rows([], [])).empty
