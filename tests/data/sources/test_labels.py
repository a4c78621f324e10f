"""A label is one class, or none, or an error that says what it is."""

from decimal import Decimal
from typing import Any

import pytest

from stages.data.sources.labels import Label, apart, class_label, label_of, safe_class, text_label
from stages.runtime.command import StageError

NAMES = ("cat", "dog")


@pytest.mark.parametrize("names", [None, NAMES])
@pytest.mark.parametrize("value", [None, float("nan"), -1, -1.0, ""])
def test_no_label_is_unlabelled_and_counted(value: Any, names: tuple[str, ...] | None) -> None:
    found = label_of(value, names, "a", "")
    assert found.class_name == "" and found.noted


@pytest.mark.parametrize("value", [1, 1.0, Decimal("1"), Decimal("1.00")])
def test_a_whole_number_is_that_number(value: Any) -> None:
    assert label_of(value, None, "a", "").class_name == "1"
    assert label_of(value, NAMES, "a", "").class_name == "dog"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (1.5, "1.5 is no whole number"),
        (float("inf"), "inf is no whole number"),
        (1e300, "is no whole number"),
        (True, "bool True"),
        ([0, 1], "a list of 2, 0, 1"),
        ([[0]], r"a list of 1, \.\.\."),
        ([], "a list of 0"),
        ({"id": 3, "name": "cat"}, "an object with 'id', 'name'"),
        ({}, "an object with nothing"),
        (b"\xff\x00", "no text in UTF-8"),
    ],
)
def test_what_is_no_class_is_refused(value: Any, match: str) -> None:
    with pytest.raises(StageError, match=f"^here.*{match}"):
        label_of(value, None, "here", "choose")


def test_a_number_needs_a_name_where_there_are_names() -> None:
    for number in (2, -2, 10**400):
        with pytest.raises(StageError, match="none of the 2 class names"):
            label_of(number, NAMES, "a", "")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"cat\n", "cat"),
        (b"\xef\xbb\xbfcat", "cat"),
        (b" 1.0 ", "1"),
        (b"1.", "1"),
        (b"007", "007"),
        (b"3D printer", "3D printer"),
        (b"\n", ""),
        (b"-1", ""),
        (b"-1.0", ""),
    ],
)
def test_text(data: bytes, expected: str) -> None:
    assert text_label(data, None, "a", "").class_name == expected


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"0 1", "more than one"),
        (b"0,1,1", "more than one"),
        (b"0.0 1.0", "more than one"),
        (b"0\n1\n", "more than one"),
        (b"cat\ndog", "more than one"),
        (b"0.7", "no whole number"),
        (b"\x01\0\0\0\0\0\0\0", "it is no text"),
        (b"\x80\x04K\x01.", "no text in UTF-8"),
        ("1".encode("utf-16"), "no text in UTF-8"),
    ],
)
def test_text_that_is_no_class(data: bytes, match: str) -> None:
    with pytest.raises(StageError, match=f"is no label.*{match}|{match}"):
        text_label(data, None, "a", "")


def test_a_class_that_no_folder_can_have_keeps_its_name_as_title() -> None:
    assert class_label("cat", "a") == Label("cat")
    found = class_label("T - shirt / top", "a")
    assert found == Label("T - shirt _ top (20c54897)", "T - shirt / top")
    assert class_label("a\nb\ud800", "a").title == "a\\nb\\ud800"


def test_no_two_names_become_one() -> None:
    names = ["a/b", "a\\b", "a_b", "a b", "a b ", " a b", ".a b", "..a b", ".", "..", "...", "/", "//", "\u200b"]
    names += ["x" * 200, "x" * 201, "x" * 202, "é" * 150, "é" * 151, "a\tb", "a\nb", "\ud800", "\ud801"]
    found = [safe_class(name) for name in names]
    assert len(set(found)) == len(names)
    for name in found:
        assert name.isprintable() and "/" not in name and name == name.strip() and not name.startswith(".")
        assert 0 < len(name.encode()) <= 200
        assert safe_class(name) == name


def test_names_that_come_twice_are_numbered() -> None:
    assert apart(["crane", "cat", "crane"]) == ("crane (0)", "cat", "crane (2)")
