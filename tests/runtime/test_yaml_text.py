"""One meaning a value: ours is DVC's, and what YAML 1.1 reads as another value is refused by key and line."""

import pytest
import yaml
from dvc.utils.serialize import loads_yaml, parse_yaml_for_update

from stages.runtime.command import StageError
from stages.runtime.yaml_text import dump_yaml, is_plain_text, parse_yaml

NUMBERS = {
    "1e-3": 0.001, "1E-3": 0.001, "1.e-3": 0.001, "1e3": 1000.0, "-2.5e+4": -25000.0, ".5": 0.5, "+1": 1, "5.": 5.0,
    "1_000": 1000, "0o17": 15, "0x1F": 31, "0b11": 3, "0": 0, "0.10": 0.1, "08.5": 8.5,
}  # fmt: skip


@pytest.mark.parametrize("written", NUMBERS)
def test_a_number_as_people_write_it_is_the_number_that_dvc_reads(written: str) -> None:
    value = parse_yaml(f"a: {written}", "params.yaml")["a"]
    assert value == NUMBERS[written] and type(value) is type(NUMBERS[written])
    assert loads_yaml(f"a: {written}")["a"] == parse_yaml_for_update(f"a: {written}", "")["a"] == value


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("010", "8 in YAML 1.1 and 10 in YAML 1.2; write 10 (or 8)"),
        ("-017_1", "-121 in YAML 1.1 and -171"),
        ("019", "text in YAML 1.1 and 19 in YAML 1.2; write 19"),
        ("1:30", "90 in YAML 1.1 and text in YAML 1.2; write 90"),
        ("12:30:45.5", "45045.5"),
        ("yes", "true in YAML 1.1 and text in YAML 1.2; write true, or, if it is text, 'yes' in quotes"),
        ("Off", "false"),
    ],
)
def test_a_value_of_two_meanings_is_refused_by_key_and_line(written: str, words: str) -> None:
    for text in (f"x: 1\na:\n- {written}\n- 1", f"x: 1\na: # why\n  b: {written}\n", f"x:\n  {written}: 1\n"):
        with pytest.raises(StageError, match=r"^params\.yaml: line [23]: `(a\.b|a\.0|x\..*)` has ") as error:
            parse_yaml(text, "params.yaml")
        assert words in str(error.value)
    assert parse_yaml(f"a: '{written}'", "params.yaml") == {"a": written}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "a key is there twice: first in line 1, then `a` in line 3"),
        ("{a: 1, b: 2, a: 3}", "first in line 1, then `a` in line 1"),
        ("a: {source: sample:x?seed=1}", "put a text with a colon in quotes"),
        ("%YAML 1.1\n---\na: 010\n", "remove the line `%YAML`"),
        ("a: 1\n---\nb: 2\n", "found another document"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ("a: \x07", "control characters"),
        ("a: *b", "undefined alias"),
        ("a: !python/name:os.system x", "could not determine a constructor"),
    ],
)
def test_what_is_no_yaml_is_one_message(text: str, words: str) -> None:
    with pytest.raises(StageError) as error:
        parse_yaml(text, "params.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_merges_aliases_and_nothing() -> None:
    text = "a: &a {x: 1e-3}\nb: {<<: *a, y: ~}\nc:\n"
    assert parse_yaml(text, "")["b"] == {"x": 0.001, "y": None}
    assert parse_yaml("# nothing\n", "") is None
    assert parse_yaml("\ufeffa: 1\n", "") == {"a": 1}


def test_what_is_written_is_read_alike_by_everybody() -> None:
    texts = [
        "yes", "010", "1e-3", "1:30", "0o17", "08", "null", "", "a: b", "ä", "@x", "2026-11-23", "a\nb", "-", "x", "=",
    ]  # fmt: skip
    values = {"texts": texts, "on": 1e-5, "1e3": None, "n": [True, 10, 1e22, 0.1]}
    written = dump_yaml(values)
    assert parse_yaml(written, "") == loads_yaml(written) == yaml.safe_load(written) == values
    assert list(filter(is_plain_text, texts)) == ["a: b", "ä", "@x", "a\nb", "-", "x"]
