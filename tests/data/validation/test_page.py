"""The page: small whatever the number of images, and what it shows of each."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.data.validation.charts import class_chart
from stages.data.validation.expectations import LEAK
from stages.data.validation.judging import judge
from stages.data.validation.page import remarks, render
from stages.data.validation.summary import summary
from stages.data.validation.validating import assign
from stages.params.batches import Batch
from stages.params.split import Split
from stages.params.validate import Validate

ROW = {"batch": "b", "role": "pretrain", "class_name": "a", "split": "train", "reason": LEAK, "sha256": "1"}


def _facts(classes: int, each: int) -> pd.DataFrame:
    """Made-up facts of a batch; no image can be read."""
    rng = np.random.default_rng(1)
    count = classes * each
    names = np.repeat([f"n{number:08d}" for number in range(classes)], each)
    return pd.DataFrame(
        {
            "key": [f"b/all/{name}/{number:07d}.jpg" for number, name in enumerate(names)],
            "batch": "b", "source_split": "all", "class_name": names, "tar": "all-00000.tar", "offset": 0,
            "bytes": rng.integers(5_000, 200_000, count), "sha256": [f"{rng.bytes(32).hex()}" for _ in range(count)],
            "format": "JPEG", "width": rng.integers(300, 500, count), "height": rng.integers(300, 500, count),
            "mode": "RGB", "orientation": 1, "decodes": True, "error": "",
            "hash": rng.integers(0, 2**64, count, dtype=np.uint64), "brightness": rng.uniform(80, 160, count),
            "contrast": rng.uniform(20, 60, count), "role": "pretrain", "arrival": 0, "group": "",
        }
    )  # fmt: skip


def _page(facts: pd.DataFrame, account: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    batches = {"b": Batch(role="pretrain", source="somewhere")}
    limits = Validate(min_images_per_class=1, max_quarantined=1)
    assign(facts, batches, Split())
    result = judge(facts, batches, limits, lambda *_: lambda left, right: np.ones(len(left), dtype=bool))
    report = summary(result, batches, limits, {"b": account})
    return render(report, result.images, Path("nowhere"), result.noted, result.collapsed), report


def test_it_begins_with_what_ingest_understood() -> None:
    account = {"images": 8, "understood": [["layout", "class folders <b>"]], "odd": ["there is one class only, x"]}
    page, report = _page(_facts(classes=2, each=4), account)
    assert report["batches"]["b"]["source"] == account
    understood, expectations = page.index("What ingest understood"), page.index('id="expectations"')
    shown = page[understood:expectations]
    assert "class folders &lt;b&gt;" in shown and "there is one class only, x" in shown and "1 odd" in shown
    assert '<details class="account" open>' in shown
    page, _ = _page(_facts(classes=2, each=4))
    assert "Not recorded: an older version ingested it." in page


def test_a_thousand_classes_and_many_faults_make_a_small_page() -> None:
    facts = _facts(classes=1000, each=40)
    facts.loc[::7, "brightness"] = 1.0  # more than it shows
    facts.loc[::11, "decodes"] = False
    for number in range(30):  # classes of one look
        facts.loc[40 * number : 40 * number + 30, "hash"] = np.uint64(0x0123456789ABCDEF * (number + 1))
    page, report = _page(facts)
    assert len(page) < 1_000_000
    assert report["quarantined_by"]["decodes"] > 3000 and page.count("and ") > 0
    assert re.search(r"Classes that look like one picture <span class=\"quiet\">· 30</span>", page)
    assert "and 18 more classes" in page
    assert len(report["notes"]) < 10 and max(map(len, report["notes"])) < 500


def test_every_note_and_every_reason_has_a_place_that_the_table_links_to() -> None:
    facts = _facts(classes=3, each=40)
    facts.loc[[0, 1], "sha256"] = "0" * 64
    facts.loc[2, "decodes"] = False
    facts.loc[3, "brightness"] = 0.0
    facts.loc[40:70, "hash"] = np.uint64(0x0123456789ABCDEF)
    page, report = _page(facts)
    linked = set(re.findall(r'href="#(\w+)"', page)) - {"expectations", "classes", "facts", "drift"}
    assert linked == set(re.findall(r'id="(\w+)"', page)) - {"expectations", "classes", "facts", "drift"}
    assert set(report["quarantined_by"]) | set(report["noted_by"]) | {"varied_class"} <= linked
    assert "usual brightness" in page and "noted" in page


def test_the_furthest_outlier_is_shown() -> None:
    facts = _facts(classes=2, each=200)
    far = facts.index[300:340]
    facts["brightness"] = 120.0
    facts.loc[far, "brightness"] = np.linspace(0, 3, len(far))[::-1]
    page, report = _page(facts)
    assert report["noted_by"]["usual_brightness"] == 40
    shown = re.findall(r'class="file">(\d+)\.jpg', page)
    assert sorted(map(int, shown)) == list(range(328, 340)) and "and 28 more" in page


def test_what_makes_a_pair_worth_a_second_look() -> None:
    test = ROW | {"split": "test"}
    assert remarks(ROW, test) == ["would have leaked into training", "the same bytes"]
    assert remarks(ROW, test | {"sha256": "2", "class_name": "b"}) == [
        "would have leaked into training", "resized, recoded or brightened", "two classes for one picture",
    ]  # fmt: skip
    twin = ROW | {"reason": "no_exact_duplicate"}
    assert remarks(twin | {"split": "fresh"}, ROW | {"batch": "old"}) == [
        "training has seen it", "came in an earlier batch",
    ]  # fmt: skip
    assert remarks(twin, ROW) == [] and remarks(ROW, None) == []


def test_few_classes_are_all_listed_and_of_many_the_ends() -> None:
    few = class_chart({"b": {"train": 3}, "a": {"train": 5, "test": 1}})
    assert [bar.name for bar in few.bars] == ["b", "a"] and not few.skyline
    many = class_chart({f"c{number:03d}": {"train": number + 1} for number in range(200)})
    assert [many.bars[0].name, many.lower_bars[-1].name] == ["c000", "c199"] and len(many.bars + many.lower_bars) == 60
    assert many.skyline.count("h1") == 200
