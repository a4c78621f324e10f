"""Figures as text."""

from stages.pages.text import count, percent, percent_range, points, shortened, signed, thousands


def test_shares() -> None:
    assert percent(0.8531) == "85.3 %"
    assert percent(0.8531, 0) == "85 %"
    assert percent_range(0.834, 0.888) == "83.4 – 88.8 %"


def test_what_is_missing_is_a_dash() -> None:
    assert percent(None) == percent(float("nan")) == percent_range(None, 1) == points(None) == "–"


def test_few_of_many_never_look_like_none() -> None:
    assert [percent(share, None) for share in (0, 0.00001, 0.0042, 0.0999, 0.25)] == [
        "0.00 %", "< 0.01 %", "0.42 %", "9.99 %", "25.0 %",
    ]  # fmt: skip


def test_differences_have_a_sign() -> None:
    assert points(-0.012) == "−1.2"
    assert signed(0.1234) == "+0.123"


def test_thousands() -> None:
    assert count(12_345) == "12\u202f345"
    assert thousands(12_345) == "12,345"


def test_a_shortened_name_keeps_its_ends() -> None:
    assert shortened("short") == "short"
    assert shortened("a" * 20 + "b" * 20, 11) == "aaaaa…bbbbb"
