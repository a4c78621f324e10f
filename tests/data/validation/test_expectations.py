"""The table of expectations, checked by Great Expectations itself."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from stages.data.validation.expectations import expectations
from stages.data.validation.great_expectations import SEVERITIES, failures
from stages.data.validation.judging import first_failures
from stages.data.validation.measures import outlying, with_measures
from stages.data.validation.words import explain, printable
from stages.params.validate import Outliers, Severities, Validate
from stages.runtime.params_file import ParamsError, check
from tests.workspace import ROOT

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
    table = expectations(limits, "image")
    assert [expectation.name for expectation in table] == list(BAD)
    failed = failures(with_measures(_facts({}, *BAD.values())), table)
    for position, name in enumerate(BAD, start=1):
        assert failed[name].tolist() == [position], name


def test_at_the_limit_an_image_passes() -> None:
    at_limit = _facts({"height": 16, "width": 160}, {"contrast": 1.0}, {"bytes": 1})
    failed = failures(with_measures(at_limit), expectations(Validate(), "image"))
    assert not any(len(rows) for rows in failed.values())


def test_the_first_failure_in_table_order_gives_the_name() -> None:
    empty = {"bytes": 0, "format": "", "decodes": False, "width": 0, "height": 0, "contrast": np.nan}
    text = empty | {"bytes": 50}
    bomb = {"width": 60_000, "height": 60_000, "decodes": False, "contrast": np.nan}
    one_pixel = {"width": 1, "height": 1, "contrast": 0.0}
    facts = _facts({}, empty, text, bomb, one_pixel)
    table = expectations(Validate(), "image")
    reason = first_failures(len(facts), table, failures(with_measures(facts), table))
    assert reason.tolist() == ["", "not_empty", "known_format", "sane_size", "large_enough"]


def test_more_failures_than_great_expectations_lists_by_default_are_all_found() -> None:
    facts = _facts(*[{"bytes": 0} if number % 2 else {} for number in range(3000)])
    failed = failures(with_measures(facts), expectations(Validate(), "image"))
    assert failed["not_empty"].tolist() == list(range(1, 3000, 2))


def test_limits_come_from_params() -> None:
    limits = Validate(formats=("PNG",), min_side=10, max_aspect=2)
    failed = failures(with_measures(_facts({}, {"height": 12})), expectations(limits, "image"))
    assert failed["known_format"].tolist() == [0, 1]
    assert failed["sane_aspect"].tolist() == [1]
    assert failed["large_enough"].tolist() == []


def test_duplicates_are_expectations_too() -> None:
    columns = {"leak_of": [None, None, "c"], "duplicate_of": [None, "a", None], "near_duplicate_of": ["b", None, None]}
    columns["conflict_with"] = [None, "d", "e"]
    failed = failures(pd.DataFrame(columns, dtype=object), expectations(Validate(), "duplicate"))
    assert {name: rows.tolist() for name, rows in failed.items()} == {
        "no_label_conflict": [1, 2],
        "no_leak_of_test": [2],
        "no_exact_duplicate": [1],
        "no_near_duplicate": [0],
    }


def test_an_empty_table_fails_nothing() -> None:
    failed = failures(with_measures(_facts({}).iloc[:0]), expectations(Validate(), "image"))
    assert all(len(rows) == 0 for rows in failed.values())


def test_every_row_of_the_table_is_complete() -> None:
    limits = Validate(severity=Severities(no_drift="stop"))
    table = expectations(limits)
    names = [expectation.name for expectation in table]
    assert len(set(names)) == len(names)
    for expectation in table:
        assert expectation.reason.endswith(".") and expectation.limit and expectation.severity in SEVERITIES
        assert expectation.fault or expectation.scope != "image"
        if expectation.parameter:
            section, *keys = expectation.parameter.split(".")
            assert section == "validate"
            values = limits.model_dump()
            for key in keys:
                assert key in values, expectation.parameter
                values = values[key]


def test_the_table_in_params_names_every_expectation_in_the_same_order_with_its_default() -> None:
    names = [expectation.name for expectation in expectations(Validate())]
    assert list(Severities.model_fields) == names
    for path in [Path("params.yaml"), *sorted(Path("presets").glob("*.yaml"))]:
        written = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["validate"]["severity"]
        assert list(written) == names, path
        assert Severities(**written) == Severities(), path


def test_severities_come_from_params() -> None:
    severity = Severities(not_flat="note", enough_to_train="note", varied_class="stop", no_drift="stop")
    found = {each.name: each.severity for each in expectations(Validate(severity=severity))}
    changed = {name: found[name] for name in ("not_flat", "enough_to_train", "varied_class", "no_drift")}
    assert changed == {"not_flat": "note", "enough_to_train": "note", "varied_class": "stop", "no_drift": "stop"}
    grey = _facts({"contrast": 0.1}, {"contrast": 0.1, "bytes": 0})
    table = expectations(Validate(severity=severity), "image")
    assert first_failures(2, table, failures(with_measures(grey), table)).tolist() == ["", "not_empty"]


@pytest.mark.parametrize(
    ("name", "severity", "rule"),
    [
        ("not_flat", "stop", "expected quarantine or note (it is of single images"),
        ("no_leak_of_test", "stop", "expected quarantine or note"),
        ("enough_to_train", "quarantine", "expected stop or note (it is of a batch or a class"),
        ("varied_class", "quarantine", "expected stop or note"),
        ("decodes", "note", "expected quarantine (training and sharding fail"),
        ("labelled", "note", "expected stop (fine-tuning"),
        ("some_accepted", "note", "expected stop (an empty batch"),
        ("not_flat", "ignore", "input should be 'quarantine', 'note' or 'stop'"),
    ],
)
def test_a_severity_that_makes_no_sense_names_the_key_and_the_rule(name: str, severity: str, rule: str) -> None:
    with pytest.raises(ParamsError) as raised:
        check("validate", {"severity": {name: severity}}, Validate)
    assert f"`validate.severity.{name}`: {rule}" in str(raised.value)


def test_an_expectation_that_there_is_not_is_an_unknown_key() -> None:
    with pytest.raises(ParamsError, match=r"unknown key `validate.severity.is_pretty`"):
        check("validate", {"severity": {"is_pretty": "note"}}, Validate)


def _light(values: list[float], arrival: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"arrival": arrival, "width": 64, "height": 64, "brightness": values})


def test_an_outlier_is_told_by_the_quartiles_of_its_own_batch() -> None:
    even = [float(value) for value in range(100, 181)]  # quartiles 120 and 160
    beyond = outlying(_light([*even, 10.0, 300.0]))["brightness_outlying"].to_numpy()
    low, high = np.quantile([*even, 10.0, 300.0], [0.25, 0.75])
    assert beyond[-2:].tolist() == pytest.approx([(low - 10) / (high - low), (300 - high) / (high - low)])
    assert beyond[40] == 0 and beyond[0] == pytest.approx((low - 100) / (high - low))
    together = outlying(pd.concat([_light([*even, 10.0, 300.0]), _light([5.0] * 500, arrival=1)], ignore_index=True))
    assert together["brightness_outlying"].to_numpy()[: len(beyond)].tolist() == beyond.tolist()
    assert not together["brightness_outlying"].to_numpy()[len(beyond) :].any()


def test_a_batch_of_one_size_has_no_outlier_a_pixel_away_but_one_eight_times_away() -> None:
    rows = _light([100.0] * 60)
    rows.loc[0, ["width", "height"]] = [65, 64]
    rows.loc[1, ["width", "height"]] = [64 * 3, 64 * 3]
    failed = failures(outlying(rows), expectations(Validate(), "outlier"))
    assert failed["usual_resolution"].tolist() == [1] and failed["usual_brightness"].tolist() == []


def test_of_a_handful_of_images_none_is_an_outlier() -> None:
    assert not outlying(_light([100.0] * 10 + [0.0])).to_numpy().any()


def test_outliers_may_be_left_alone() -> None:
    names = [each.name for each in expectations(Validate(outliers=Outliers(brightness=None)), "outlier")]
    assert names == ["usual_resolution"]


def test_every_stop_has_words() -> None:
    limits = Validate(severity=Severities(no_drift="stop"))
    counts = {"images": 9, "accepted": 1, "quarantined": 8, "share_quarantined": 8 / 9, "unlabelled": 2, "train": 0,
              "alike": 8, "largest": 300, "test": 0, "val": 1, "frames": 30, "sequences": 2, "apart": 3.0,
              "apart_by_chance": 30.0}  # fmt: skip
    names = {
        "batch": "b",
        "role": "finetune",
        "class_name": "cat",
        "new_in": "b",
        "fact": "width",
        "distance": 0.5,
        "first": "f_1.png",
        "second": "f_2.png",
        "group": "p1",
        "advice": "?group=",
        "where": "b train 1, b test 2",
    }
    wrong = pd.DataFrame([counts | names])
    images = pd.DataFrame(
        {"batch": ["b"], "key": ["b/all/cat/1"], "reason": ["decodes"], "error": ["cut"], "duplicate_of": [""]}
    )
    for expectation in expectations(limits, "batch", "batch class", "class", "group", "drift"):
        (message,) = explain(expectation, wrong, images)
        assert "`b`" in message or "finetune" in message
        assert expectation.parameter in message, expectation.name
        if expectation.severity == "stop" and expectation.name in ("known_class", "no_drift"):
            (noted,) = explain(dataclasses.replace(expectation, severity="note"), wrong, images)
            assert message.startswith(noted) and noted != message  # a note asks nobody to do anything


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb"])
def test_file_names_cannot_play_tricks_on_a_terminal(name: str) -> None:
    assert printable(name).isprintable()
    assert printable("größe 猫.jpg") == "größe 猫.jpg"
