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


def _rows(sources: list[str], each: int, **columns: object) -> pd.DataFrame:
    rows = pd.DataFrame({"source_split": np.repeat(sources, each), "sha256": _shas(each * len(sources))})
    return rows.assign(**{"class_name": "", "group": "", "counts": True} | columns)  # type: ignore[arg-type]


def _assigned(rows: pd.DataFrame, later: bool = False, limits: Split = LIMITS, role: str = "finetune") -> np.ndarray:
    return assign_splits(rows, role, later, limits, pd.Series(dtype=object))


def _split(sources: list[str], each: int = 2000, later: bool = False) -> pd.DataFrame:
    rows = _rows(sources, each)
    return rows.assign(source=rows["source_split"], split=_assigned(rows, later))


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


def test_a_larger_fraction_only_adds() -> None:
    rows = _rows(["all"], 2000)
    small = _assigned(rows, limits=Split(test_fraction=0.1)) == "test"
    large = _assigned(rows, limits=Split(test_fraction=0.3)) == "test"
    assert large[small].all() and small.sum() == 200 and large.sum() == 600


@pytest.mark.parametrize(
    ("images", "expected"),
    [(1, (0, 0, 1)), (2, (0, 0, 2)), (3, (1, 1, 1)), (5, (1, 1, 3)), (10, (2, 1, 7)), (100, (20, 8, 72))],
)
def test_every_class_of_three_images_or_more_has_each_split(images: int, expected: tuple[int, int, int]) -> None:
    rows = _rows(["all"], 40 * images, class_name=[f"c{number % 40}" for number in range(40 * images)])
    counts = rows.assign(split=_assigned(rows)).groupby(["class_name", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["test", "val", "train"], fill_value=0)
    assert {tuple(row) for row in counts.to_numpy().tolist()} == {expected}


def test_the_order_of_the_rows_changes_nothing() -> None:
    rows = _rows(["all"], 300, class_name=list("abc") * 100, group=[f"g{number % 37}" for number in range(300)])
    mixed = rows.sample(frac=1, random_state=0)
    assert pd.Series(_assigned(mixed), mixed.index).sort_index().tolist() == _assigned(rows).tolist()


def test_what_does_not_count_takes_no_place() -> None:
    rows = _rows(["all"], 9, class_name="a")
    for spoilt in range(9):  # the fewer there are, the more must be held out of what is left
        rows.loc[:spoilt, "counts"] = False
        split = _assigned(rows)
        held_out = set(split[rows["counts"]].tolist()) if rows["counts"].sum() >= 3 else {"train", "test", "val"}
        assert held_out == {"train", "test", "val"}
        assert (split[~rows["counts"]] == "train").all()


def test_no_share_draws_nothing() -> None:
    rows = _rows(["all"], 30)
    assert set(_assigned(rows, limits=Split(test_fraction=0, val_fraction=0))) == {"train"}
    assert set(_assigned(rows, limits=Split(test_fraction=0.2, val_fraction=0))) == {"train", "test"}


def test_fractions_are_uniform_and_independent_and_as_documented() -> None:
    sha = _shas(4000)
    test, val = content_fractions(sha, "test"), content_fractions(sha, "val")
    assert test[7] == pytest.approx(int(sha[7][:15], 16) / 16**15)
    assert test.min() >= 0 and test.max() <= 1 and abs(test.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(test, val)[0, 1]) < 0.05


def test_same_bytes_fall_into_the_same_split() -> None:
    rows = _rows(["all"], 1000, class_name=["a"] * 500 + ["b"] * 500)
    rows["sha256"] = [*_shas(500), *_shas(500)]
    split = _assigned(rows)
    assert split[:500].tolist() == split[500:].tolist()


def test_the_evaluated_split_comes_first() -> None:
    ranks = precedence(np.array(["train", "val", "test"], dtype=object))
    assert ranks[2] < ranks[1] < ranks[0]


def test_classes_are_append_only() -> None:
    first, second, third = pd.Series(["cat", "ant", ""]), pd.Series(["zebra", "bee", "ant"]), pd.Series(["aardvark"])
    batches = [(first, False), (second, False), (third, True)]
    assert class_list(batches[:1]) == ["ant", "cat"]
    assert class_list(batches[:2]) == ["ant", "cat", "bee", "zebra"]
    assert class_list(batches) == ["ant", "cat", "bee", "zebra", "aardvark"]


def test_numbers_are_in_their_order_but_in_the_list_of_an_older_version() -> None:
    first, second = pd.Series(list(map(str, range(12)))), pd.Series(["100", "20", "9"])
    assert class_list([(first, False)]) == list(map(str, range(12)))
    assert class_list([(first, True)])[:4] == ["0", "1", "10", "11"]
    assert class_list([(first, True), (second, False)])[-2:] == ["20", "100"]
    assert class_list([(pd.Series(["07", "11", "b", "007", "a"]), False)]) == ["007", "07", "11", "a", "b"]


def test_unlabelled_is_minus_one() -> None:
    assert labels(pd.Series(["b", "", "a"]), ["a", "b"]).tolist() == [1, -1, 0]
    assert labels(pd.Series(["", ""]), []).tolist() == [-1, -1]
