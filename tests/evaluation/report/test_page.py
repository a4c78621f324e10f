"""What the page says is what the figures are, and no name can break out of it."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import report as made_up
from stages.evaluation.metrics import confusion_matrix, worst_class
from stages.evaluation.report import page
from stages.evaluation.report.confusion_map import clustered, confusion_map


def test_classes_come_weakest_first_with_what_they_were_taken_for() -> None:
    confusion = np.array([[9, 1, 0], [3, 5, 2], [0, 0, 0]])
    rows = page.class_rows(["a", "b", "c"], confusion, 0.95)
    assert [row["name"] for row in rows] == ["b", "a", "c"]
    assert (rows[0]["taken_for"], rows[0]["times"], rows[0]["recall"]) == ("a", 3, 0.5)
    assert rows[0]["low"] < 0.5 < rows[0]["high"]
    assert np.isnan(rows[2]["recall"])


def test_confused_pairs_are_mistakes_the_most_frequent_first() -> None:
    pairs = page.confused_pairs(["a", "b"], np.array([[9, 1], [3, 5]]))
    assert [(pair["actual"], pair["predicted"], pair["times"]) for pair in pairs] == [("b", "a", 3), ("a", "b", 1)]
    assert page.confused_pairs(["a", "b"], np.diag([3, 4])) == []


def test_of_many_classes_the_heat_map_shows_those_with_mistakes() -> None:
    labels = np.arange(500) % 100
    predicted = np.where(labels == 77, 5, labels)
    shown = page.heat_map([str(i) for i in range(100)], confusion_matrix(labels, predicted, 100))
    assert len(shown["rows"]) == page.MOST_CLASSES_IN_HEAT_MAP
    assert {"77", "5"} <= set(shown["names"])
    assert not shown["whole"]


def test_ticks_are_round_and_within() -> None:
    assert page.ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert page.ticks(0, 3.3, 4) == [0, 1, 2, 3]


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


def test_no_name_breaks_out_of_the_page_of_many_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"</script><script>alert({i})</script>&\"'" for i in range(30)]
    test, facts = made_up.answers(900, 30)
    made_up.write_inputs(facts)
    made_up.built(test, names)
    page = Path("reports/report.html").read_text()
    assert page.count("<script") == 2 and "alert(1)" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)
    found = re.search(r'<script type="application/json" id="confusion">(.*?)</script>', page, re.DOTALL)
    assert found
    shown = json.loads(found[1])
    assert sorted(shown["names"]) == sorted(names)
    assert sum(count for _, _, count in shown["cells"]) == 900


def test_of_equally_weak_classes_the_first_is_the_worst_as_in_the_figures() -> None:
    confusion = np.array([[1, 1, 0], [0, 9, 1], [10, 10, 20]])
    rows = page.class_rows(["b", "c", "a"], confusion, 0.95)
    assert rows[0]["name"] == ["b", "c", "a"][worst_class(confusion) or 0] == "b"


def test_a_loss_of_zero_has_a_chart() -> None:
    panels = page.curve_panels({"finetuned": [{"epoch": 1, "train_loss": 0.0, "val_loss": 0.0}]})
    assert [panel["title"] for panel in panels] == ["Target: loss"]
