"""Cron expressions that have one meaning and fire: five fields, of what every cron knows.

Prefect executes them with croniter, which takes more: a sixth field means seconds there, a seventh years, and elsewhere
the first one is seconds. Nor does it mind a date that no year has.
"""

import re

SHORT = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_FIELDS: dict[str, tuple[int, int, dict[str, int]]] = {
    "minute": (0, 59, {}),
    "hour": (0, 23, {}),
    "day": (1, 31, {}),
    "month": (1, 12, {name: at + 1 for at, name in enumerate(_MONTHS)}),
    "weekday": (0, 7, {name: at for at, name in enumerate(_WEEKDAYS)}),
}
_ITEM = re.compile(r"(?:\*|([0-9]+|[a-z]{3})(?:-([0-9]+|[a-z]{3}))?)(?:/([0-9]+))?")


def checked_cron(expression: str) -> str:
    """The expression itself.

    Raises:
        ValueError: it is no cron expression, means different things to different readers, or never fires.
    """
    if expression.strip() in SHORT:
        return expression
    fields = expression.split()
    if len(fields) != len(_FIELDS):
        seconds = "; there are no seconds, and no years" if len(fields) in (6, 7) else ""
        raise ValueError(
            f"expected 5 fields: minute, hour, day, month and weekday, as in '0 3 * * *' (UTC), "
            f"not {len(fields)}{seconds}"
        )
    values = [_values(name, field.lower()) for name, field in zip(_FIELDS, fields, strict=True)]
    days, months = values[2], values[3]
    if "*" not in (fields[2], fields[4]) and "*" in fields[2] + fields[4]:
        raise ValueError(f"day {fields[2]} and weekday {fields[4]}: some readers take both, others either; use one")
    # With a weekday too, any of the two is enough; croniter fires on none where the date does not exist.
    if all(min(days) > _DAYS[month - 1] for month in months):
        raise ValueError(f"never fires: no year has day {fields[2]} in month {fields[3]}")
    return expression


def _values(name: str, field: str) -> set[int]:
    """The numbers that a field stands for."""
    return {value for item in field.split(",") for value in _item(name, field, item)}


def _item(name: str, field: str, item: str) -> range:
    low, high, names = _FIELDS[name]
    match = _ITEM.fullmatch(item)
    if not match or (item == "*" != field):
        raise ValueError(f"the {name} is {field!r}; expected *, numbers, names, ranges (1-5), steps (*/15) and commas")
    first, last, step = match.groups()
    if step and first and not last:
        raise ValueError(f"the {name} is {field!r}; write where the steps end: {first}-{high}/{step}")
    begin = _number(name, first, names) if first else low
    end = _number(name, last, names) if last else (begin if first else high)
    if last == "sun" and begin > 0:
        end = 7
    if not low <= begin <= high or not low <= end <= high:
        raise ValueError(f"the {name} is {field!r}, and goes from {low} to {high}")
    if last and end <= begin:  # croniter takes 8-8 for all
        raise ValueError(f"the {name} is {field!r}, and a range ends after it begins; write the values, with commas")
    every = int(step) if step else 1
    if not 1 <= every <= max(1, end - begin):
        raise ValueError(f"the {name} is {field!r}; a step is 1 or more, and no longer than what it divides")
    return range(begin, end + 1, every)


def _number(name: str, text: str, names: dict[str, int]) -> int:
    if text.isdigit():
        return int(text)
    if text not in names:
        known = ", ".join(["a number", *names])
        raise ValueError(f"the {name} has {text!r}; expected {known}")
    return names[text]
