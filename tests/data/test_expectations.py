"""The table of expectations, checked by Great Expectations itself."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from stages.data.expectations import (
    SEVERITIES,
    duplicate_expectations,
    explain,
    failures,
    first_failures,
    image_expectations,
    printable,
    table_expectations,
    with_measures,
)
from stages.params.validate import Drift, Validate

GOOD = {"bytes": 900, "format": "JPEG", "decodes": True, "width": 64, "height": 48, "contrast": 40.0}
BAD: dict[str, Mapping[str, object]] = {
    "not_empty": {"bytes": 0},
    "known_format": {"format": "GIF"},
    "sane_size": {"width": 60_000, "height": 60_000},
    "decodes": {"decodes": False, "contrast": np.nan},
    "large_enough": {"height": 15},
    "sane_aspect": {"width": 481},
    "not_flat": {"contrast": 0.9},
}


def _facts(*changes: Mapping[str, object]) -> pd.DataFrame:
    return pd.DataFrame([GOOD | dict(change) for change in changes])


def test_each_image_expectation_fails_its_own_fault_and_no_other() -> None:
    limits = Validate()
    expectations = image_expectations(limits)
    assert [expectation.name for expectation in expectations] == list(BAD)
    failed = failures(with_measures(_facts({}, *BAD.values())), expectations)
    for position, name in enumerate(BAD, start=1):
        assert failed[name].tolist() == [position], name


def test_at_the_limit_an_image_passes() -> None:
    at_limit = _facts({"height": 16, "width": 160}, {"contrast": 1.0}, {"bytes": 1})
    failed = failures(with_measures(at_limit), image_expectations(Validate()))
    assert not any(len(rows) for rows in failed.values())


def test_the_first_failure_in_table_order_gives_the_name() -> None:
    empty = {"bytes": 0, "format": "", "decodes": False, "width": 0, "height": 0, "contrast": np.nan}
    text = empty | {"bytes": 50}
    bomb = {"width": 60_000, "height": 60_000, "decodes": False, "contrast": np.nan}
    one_pixel = {"width": 1, "height": 1, "contrast": 0.0}
    facts = _facts({}, empty, text, bomb, one_pixel)
    expectations = image_expectations(Validate())
    reason = first_failures(len(facts), expectations, failures(with_measures(facts), expectations))
    assert reason.tolist() == ["", "not_empty", "known_format", "sane_size", "large_enough"]


def test_more_failures_than_great_expectations_lists_by_default_are_all_found() -> None:
    facts = _facts(*[{"bytes": 0} if number % 2 else {} for number in range(3000)])
    failed = failures(with_measures(facts), image_expectations(Validate()))
    assert failed["not_empty"].tolist() == list(range(1, 3000, 2))


def test_limits_come_from_params() -> None:
    limits = Validate(formats=("PNG",), min_side=10, max_aspect=2)
    failed = failures(with_measures(_facts({}, {"height": 12})), image_expectations(limits))
    assert failed["known_format"].tolist() == [0, 1]
    assert failed["sane_aspect"].tolist() == [1]
    assert failed["large_enough"].tolist() == []


def test_duplicates_are_expectations_too() -> None:
    table = pd.DataFrame({"duplicate_of": [None, "a", None], "near_duplicate_of": ["b", None, None]}, dtype=object)
    failed = failures(table, duplicate_expectations())
    assert {name: rows.tolist() for name, rows in failed.items()} == {
        "no_exact_duplicate": [1],
        "no_near_duplicate": [0],
    }


def test_an_empty_table_fails_nothing() -> None:
    failed = failures(with_measures(_facts({}).iloc[:0]), image_expectations(Validate()))
    assert all(len(rows) == 0 for rows in failed.values())


def test_every_row_of_the_table_is_complete() -> None:
    limits = Validate(drift=Drift(stop=True))
    table = [*image_expectations(limits), *duplicate_expectations(), *table_expectations(limits)]
    names = [expectation.name for expectation in table]
    assert len(set(names)) == len(names)
    for expectation in table:
        assert expectation.reason.endswith(".") and expectation.limit and expectation.severity in SEVERITIES
        assert expectation.fault or expectation.severity != "quarantine"
        if expectation.parameter:
            key = expectation.parameter.removeprefix("validate.")
            assert key in Validate.model_fields, expectation.parameter


def test_every_stop_has_words() -> None:
    limits = Validate(drift=Drift(stop=True))
    counts = {"images": 9, "accepted": 1, "quarantined": 8, "share_quarantined": 8 / 9, "unlabelled": 2, "train": 0}
    names = {"batch": "b", "role": "finetune", "class_name": "cat", "new_in": "b", "fact": "width", "distance": 0.5}
    wrong = pd.DataFrame([counts | names])
    images = pd.DataFrame(
        {"batch": ["b"], "key": ["b/all/cat/1"], "reason": ["decodes"], "error": ["cut"], "duplicate_of": [""]}
    )
    for expectation in table_expectations(limits):
        (message,) = explain(expectation, wrong, images)
        assert "`b`" in message or "finetune" in message
        assert expectation.parameter in message, expectation.name


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb"])
def test_file_names_cannot_play_tricks_on_a_terminal(name: str) -> None:
    assert printable(name).isprintable()
    assert printable("größe 猫.jpg") == "größe 猫.jpg"
