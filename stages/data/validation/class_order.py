"""The order of a new list of classes: `class_id` is the place in it."""

from collections.abc import Iterable


def class_order(names: Iterable[str]) -> list[str]:
    """Names as they are numbered: whole numbers by their value and before all others, the others as text."""
    return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
