"""Splits: by the source's own where it has them, else by content hash; labels from an append-only list."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from stages.data.validation.splits import assign_splits, class_list, content_fractions, labels, precedence
from stages.params.split import Split

LIMITS = Split(val_fraction=0.1, test_fraction=0.2, fresh_fraction=0.3)


def _shas(count: int, start: int = 0) -> pd.Series:
    return pd.Series([hashlib.sha256(str(number).encode()).hexdigest() for number in range(start, start + count)])


def _split(sources: list[str], each: int = 2000, later: bool = False) -> pd.DataFrame:
    source, sha = pd.Series(np.repeat(sources, each)), _shas(each * len(sources))
    return pd.DataFrame({"source": source, "sha256": sha, "split": assign_splits(source, sha, later, LIMITS)})


def _shares(frame: pd.DataFrame) -> dict[str, float]:
    return {str(split): share for split, share in frame["split"].value_counts(normalize=True).items()}


def test_a_source_with_three_splits_keeps_them() -> None:
    frame = _split(["train", "val", "test"])
    assert (frame["split"] == frame["source"]).all()


def test_with_train_and_val_only_its_val_is_our_test() -> None:
    frame = _split(["train", "val"])
    assert set(frame.loc[frame["source"] == "val", "split"]) == {"test"}
    assert _shares(frame[frame["source"] == "train"]) == pytest.approx({"train": 0.9, "val": 0.1}, abs=0.02)


def test_with_train_and_test_only_val_comes_from_train() -> None:
    frame = _split(["train", "test"])
    assert set(frame.loc[frame["source"] == "test", "split"]) == {"test"}
    assert _shares(frame[frame["source"] == "train"]) == pytest.approx({"train": 0.9, "val": 0.1}, abs=0.02)


@pytest.mark.parametrize("only", ["all", "train"])
def test_one_pool_is_divided_by_content(only: str) -> None:
    shares = _shares(_split([only], each=5000))
    assert shares == pytest.approx({"test": 0.2, "val": 0.08, "train": 0.72}, abs=0.02)


@pytest.mark.parametrize("sources", [["all"], ["train", "val"], ["train", "val", "test"]])
def test_a_later_finetune_batch_sets_fresh_aside_and_has_no_test(sources: list[str]) -> None:
    shares = _shares(_split(sources, later=True))
    assert shares == pytest.approx({"fresh": 0.3, "val": 0.07, "train": 0.63}, abs=0.02)


def test_an_image_stays_on_its_side_whatever_comes_beside_it() -> None:
    few, many = _split(["all"], each=100), _split(["all"], each=3000)
    assert few["split"].tolist() == many["split"].tolist()[:100]


def test_a_larger_fraction_only_adds() -> None:
    source, sha = pd.Series(["all"] * 2000), _shas(2000)
    small = assign_splits(source, sha, False, Split(test_fraction=0.1)) == "test"
    large = assign_splits(source, sha, False, Split(test_fraction=0.3)) == "test"
    assert large[small].all() and large.sum() > small.sum()


def test_fractions_are_uniform_and_independent_and_as_documented() -> None:
    sha = _shas(4000)
    test, val = content_fractions(sha, "test"), content_fractions(sha, "val")
    assert test[7] == pytest.approx(int(sha[7][:15], 16) / 16**15)
    assert test.min() >= 0 and test.max() <= 1 and abs(test.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(test, val)[0, 1]) < 0.05


def test_same_bytes_fall_into_the_same_split() -> None:
    sha = pd.concat([_shas(500), _shas(500)], ignore_index=True)
    split = assign_splits(pd.Series(["all"] * 1000), sha, False, LIMITS)
    assert split[:500].tolist() == split[500:].tolist()


def test_the_evaluated_split_comes_first() -> None:
    ranks = precedence(np.array(["train", "val", "test"], dtype=object))
    assert ranks[2] < ranks[1] < ranks[0]


def test_classes_are_append_only() -> None:
    first, second, third = pd.Series(["cat", "ant", ""]), pd.Series(["zebra", "bee", "ant"]), pd.Series(["aardvark"])
    assert class_list([first]) == ["ant", "cat"]
    assert class_list([first, second]) == ["ant", "cat", "bee", "zebra"]
    assert class_list([first, second, third]) == ["ant", "cat", "bee", "zebra", "aardvark"]


def test_unlabelled_is_minus_one() -> None:
    assert labels(pd.Series(["b", "", "a"]), ["a", "b"]).tolist() == [1, -1, 0]
    assert labels(pd.Series(["", ""]), []).tolist() == [-1, -1]
