"""The table of promotions in a model's description."""

from dataclasses import replace

import pytest

from pipelines.promotion.history import LEFT_OUT, LONGEST, Promotion, promotions, with_promotion

FIRST = Promotion("2026-11-23T03:00:05+00:00", 1, None, "", "passed")
SECOND = Promotion("2026-11-24T10:20:30+00:00", 7, 1, "Ana | ops\\", "override: two\nlines | of it")


def test_lines_are_read_as_they_were_written_newest_first() -> None:
    text = with_promotion(with_promotion("", "bells", FIRST), "bells", SECOND)
    as_one_line = replace(SECOND, verdict="override: two lines | of it")
    assert promotions(text) == [as_one_line, FIRST]
    assert "| 2026-11-23 03:00:05 | [1](/#/models/bells/versions/1) |  |  | passed |" in text


def test_a_promotion_is_written_once() -> None:
    text = with_promotion("About bells.", "bells", FIRST)
    assert with_promotion(text, "bells", FIRST) == text


def test_a_version_that_comes_back_within_a_second_has_a_line_of_its_own() -> None:
    text = ""
    back = [replace(SECOND, when=FIRST.when), replace(FIRST, instead_of=7), replace(SECOND, when=FIRST.when)]
    for each in [FIRST, *back]:
        text = with_promotion(text, "bells", each)
    assert [each.version for each in promotions(text)] == [7, 1, 7, 1]


def test_what_people_wrote_around_the_table_stays() -> None:
    text = with_promotion("About bells.\n\n- one\n- two", "bells", FIRST) + "\nAsk the *bell team*.\n"
    text = with_promotion(text, "bells", SECOND)
    assert text.startswith("About bells.\n\n- one\n- two\n\n## Promotions\n\n| When")
    assert text.endswith("| passed |\n\nAsk the *bell team*.\n")
    assert [each.version for each in promotions(text)] == [7, 1]


def test_a_table_of_somebody_else_further_down_stays_whole() -> None:
    theirs = "## Owners\n\n| who | what |\n|---|---|\n| Ana | bells |\n"
    text = with_promotion(with_promotion("", "bells", FIRST) + f"\n{theirs}", "bells", SECOND)
    assert text.endswith(f"| passed |\n\n{theirs}")
    assert [each.version for each in promotions(text.replace("\n\n| When", "\n\nAsk Ana.\n\n| When"))] == [7, 1]


def test_what_a_person_writes_is_shown_and_is_no_markdown() -> None:
    words = r"[a_b](javascript:x) <img src=x> *c* `d | \` & &lt; ![e](f)"
    text = with_promotion("", "bells", replace(FIRST, by=words, verdict=f"override: {words}"))
    assert r"\[a\_b\](javascript:x) &lt;img src=x&gt; \*c\* \`d \| \\\` &amp; &amp;lt; !\[e\](f) |" in text
    assert promotions(text) == [replace(FIRST, by=words, verdict=f"override: {words}")]


def test_a_description_without_room_for_a_line_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    full = "x" * (LONGEST - 100)
    assert with_promotion(full, "bells", FIRST) == full
    assert "too long for the table" in caplog.text


@pytest.mark.parametrize("lost", ["About", "## Promotions", "## Promotions\n\n| a | b |\n|---|---|\n| 1 | 2 |"])
def test_a_table_that_somebody_spoilt_does_not_stop_the_next_line(lost: str) -> None:
    assert promotions(lost) == []
    assert promotions(with_promotion(lost, "bells", FIRST)) == [FIRST]


def test_the_oldest_lines_go_when_the_description_is_full() -> None:
    text = "About bells."
    for number in range(1, 201):
        text = with_promotion(
            text, "bells", Promotion(f"2026-11-23T03:{number:05}", number, number - 1, "Ana", "passed")
        )
    assert len(text) <= LONGEST
    assert text.count(LEFT_OUT) == 1
    assert text.startswith("About bells.")
    kept = [each.version for each in promotions(text)]
    assert kept == list(range(200, 200 - len(kept), -1))
    assert len(kept) > 40
