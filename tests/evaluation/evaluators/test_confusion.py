"""Pairs, heat map and the whole matrix."""

import io

import numpy as np
import pytest
from PIL import Image

from stages.evaluation.evaluators import confusion as evaluator
from stages.evaluation.evaluators.confusion_map import clustered, confusion_map
from stages.evaluation.metrics import confusion_matrix


def test_confused_pairs_are_mistakes_the_most_frequent_first() -> None:
    pairs = evaluator.confused_pairs(["a", "b"], np.array([[9, 1], [3, 5]]))
    assert [(pair["actual"], pair["predicted"], pair["times"]) for pair in pairs] == [("b", "a", 3), ("a", "b", 1)]
    assert evaluator.confused_pairs(["a", "b"], np.diag([3, 4])) == []


def test_of_many_classes_the_heat_map_shows_those_with_mistakes() -> None:
    labels = np.arange(500) % 100
    predicted = np.where(labels == 77, 5, labels)
    shown = evaluator.heat_map([str(i) for i in range(100)], confusion_matrix(labels, predicted, 100))
    assert len(shown["rows"]) == evaluator.MOST_IN_HEAT_MAP
    assert {"77", "5"} <= set(shown["names"])
    assert not shown["whole"]


def test_classes_that_are_taken_for_each_other_stand_side_by_side() -> None:
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(8), 5))
    likely = np.where(group[:, None] == group, 0.05, 0.001) + 0.7 * np.eye(40)
    confusion = np.stack([rng.multinomial(200, row / row.sum()) for row in likely])
    order = clustered(confusion)
    assert sorted(order) == list(range(40))
    assert np.count_nonzero(np.diff(group[order])) == 7  # eight blocks


def test_the_map_shows_every_cell_that_is_not_empty() -> None:
    confusion = np.array([[90, 0, 10], [0, 50, 0], [1, 0, 400]])
    found = confusion_map(["a", "b", "c"], confusion)
    pixels = np.asarray(Image.open(io.BytesIO(found.png)))
    assert pixels.shape == (600, 600, 4)
    assert sorted((found.names[row], found.names[column], count) for row, column, count in found.cells) == [
        ("a", "a", 90), ("a", "c", 10), ("b", "b", 50), ("c", "a", 1), ("c", "c", 400),
    ]  # fmt: skip
    shown = {(row, column) for row, column, _ in found.cells}
    for row in range(3):
        for column in range(3):
            cell = pixels[200 * row + 100, 200 * column + 100]
            assert (cell[3] > 0) == ((row, column) in shown)
            if cell[3]:
                assert tuple(cell[:3]) == ((31, 95, 158) if row == column else (180, 71, 44))


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes_have_an_order(classes: int) -> None:
    assert sorted(clustered(np.eye(classes, dtype=np.int64))) == list(range(classes))
