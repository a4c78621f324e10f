"""Numbers and names as text, the same on every page and card.

A value that is missing (None or NaN) is a dash. Blanks are plain here; the pages make them unbreakable.
"""

from math import isnan

ABSENT = "–"
MOST_OF_A_NAME = 32


def percent(share: float | None, digits: int | None = 1) -> str:
    """`0.8531` as `85.3 %`. With digits None two digits below 10 %, so that few of many never look like none."""
    if share is None or isnan(share):
        return ABSENT
    if digits is None:
        if 0 < share < 0.0001:
            return "< 0.01 %"
        digits = 2 if share < 0.1 else 1
    return f"{100 * share:.{digits}f} %"


def percent_range(low: float | None, high: float | None, digits: int = 1) -> str:
    """Two shares as `83.4 – 88.8 %`."""
    if low is None or high is None or isnan(low) or isnan(high):
        return ABSENT
    return f"{100 * low:.{digits}f} – {percent(high, digits)}"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points: `+12.3`."""
    return signed(None if difference is None else 100 * difference, digits=1)


def signed(difference: float | None, digits: int = 3) -> str:
    """A difference of numbers that are no shares: `+0.123`."""
    return ABSENT if difference is None or isnan(difference) else f"{difference:+.{digits}f}".replace("-", "−")


def decimal(value: float | None, digits: int = 3) -> str:
    """A number that is no share."""
    return ABSENT if value is None or isnan(value) else f"{value:.{digits}f}"


def count(number: int) -> str:
    """Thousands set apart by a narrow blank."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def thousands(number: float) -> str:
    """A whole number, thousands set apart by a comma."""
    return f"{number:,.0f}"


def words(name: str) -> str:
    """A key as people read it."""
    return name.replace("_", " ")


def shortened(name: str, most: int = MOST_OF_A_NAME) -> str:
    """A name that fits into a table: its beginning and its end."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"
