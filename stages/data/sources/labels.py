"""Labels as shards hold them (numbers, names, null, and what is no label) as names of classes."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from stages.runtime.command import StageError

LONGEST = 180
"""Bytes of a class name that is kept of a longer one, before its checksum."""
SEVERAL = re.compile(r"[+-]?\d+(\.\d*)?([\s,;|]+[+-]?\d+(\.\d*)?)+")


class Label(NamedTuple):
    """The class of one image."""

    class_name: str  # a folder can have this name; empty: unlabelled
    title: str = ""  # what the source calls the class, where that is another name
    noted: str = ""  # for the account: why there is none, or how it was converted


def label_of(value: Any, names: Sequence[str] | None, where: str, hint: str) -> Label:
    """The class that a value stands for: null, NaN and -1 are unlabelled, a whole float is that number.

    Args:
        value: as JSON or a column of Parquet has it.
        names: of numbered classes; None: a number is the name.
        where: the image, for messages.
        hint: for messages: how another field is named.

    Raises:
        StageError: it is no single class: a list, an object, a fraction, a number without a name.
    """
    if value is None or value != value:  # NaN, which pandas writes for null
        return Label("", noted="unlabelled: its label is null")
    if isinstance(value, bytes):
        value = _decoded(value, where)
    if isinstance(value, (float, Decimal)):
        if not _is_whole(value):
            raise StageError(f"{where}: the label {value} is no whole number, so no class; {hint}")
        found = _numbered(int(value), names, where)
        return found if found.noted else found._replace(noted="label is a whole number with a decimal point")
    if isinstance(value, int) and not isinstance(value, bool):
        return _numbered(value, names, where)
    if isinstance(value, str):
        return class_label(value, where) if value else Label("", noted="unlabelled: its label is empty")
    raise StageError(f"{where}: the label is {_described(value)}; an image has one class, a number or a name; {hint}")


def text_label(data: bytes, names: Sequence[str] | None, where: str, hint: str) -> Label:
    """The class that a small text file tells; the spaces around it are none of it.

    Raises:
        StageError: it is no text in UTF-8, or no single class.
    """
    text = _decoded(data, where).strip()
    if any(ord(each) < 32 and each not in "\t\r\n" for each in text):
        raise StageError(f"{where} is no label: it is no text ({data[:16]!r}); write the class as text, or {hint}")
    if "\n" in text or "\r" in text or SEVERAL.fullmatch(text):
        raise StageError(f"{where} is no label: {text[:60]!r} is more than one; an image has one class; {hint}")
    if re.fullmatch(r"[+-]?\d+\.\d*", text):
        return label_of(Decimal(text), names, where, hint)
    if text == "-1" or (names is not None and re.fullmatch(r"-?\d+", text, re.ASCII)):
        return _numbered(int(text) if len(text) < 20 else 10**20, names, where)
    return label_of(text, names, where, hint)


def class_label(name: str, where: str) -> Label:
    """A class by its name: one that no folder can have is replaced, and stays as the title.

    Raises:
        StageError: the name is empty.
    """
    if not name:
        raise StageError(f"{where}: the name of its class is empty")
    safe = safe_class(name)
    title = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
    return Label(safe, title[:200] if safe != name else "")


def safe_class(name: str) -> str:
    """The name as it is if a folder can have it, else a readable one with a checksum: no two names become one.

    It depends on the name alone, so that a class has one name in all shards and batches.
    """
    clean = "".join("_" if each in "/\\" or not each.isprintable() else each for each in name).strip().lstrip(".")
    if clean == name and len(name.encode()) <= 200:
        return name
    clean = clean.encode()[:LONGEST].decode("utf-8", "ignore").strip()
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{clean or 'class'} ({digest})"


def apart(names: Sequence[str]) -> tuple[str, ...]:
    """Names of numbered classes, each once: a name that several classes have gets their numbers.

    ImageNet has two cranes, a bird and a machine, and they must stay two classes.
    """
    often = Counter(names)
    return tuple(f"{name} ({number})" if often[name] > 1 else name for number, name in enumerate(names))


def group_name(value: Any, where: str) -> str:
    """The name of a group as a shard tells it; empty where it tells none.

    Raises:
        StageError: it is a list or an object.
    """
    if value is None or value is MISSING or value != value:
        return ""
    if isinstance(value, (dict, list)):
        raise StageError(f"{where}: its group is {_described(value)}; expected a number or a name")
    if isinstance(value, bytes):
        value = _decoded(value, where)
    return str(int(value) if isinstance(value, (float, Decimal)) and _is_whole(value) else value)


MISSING = object()


def nested(value: Any, path: str) -> Any:
    """What an object has at a path, `meta.class`; `MISSING` where there is none."""
    if not isinstance(value, dict):
        return MISSING
    if path in value:
        return value[path]
    head, _, rest = path.partition(".")
    return nested(value[head], rest) if rest and head in value else MISSING


def _numbered(number: int, names: Sequence[str] | None, where: str) -> Label:
    if number == -1:
        return Label("", noted="unlabelled: its label is -1")
    if names is None:
        return Label(str(number))
    if not 0 <= number < len(names):
        raise StageError(f"{where}: the label {str(number)[:30]} is none of the {len(names)} class names")
    return class_label(names[number], where)


def _is_whole(value: float | Decimal) -> bool:
    return abs(float(value)) < 2**53 and value == int(value)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StageError(f"{where} is no label: no text in UTF-8 ({data[:16]!r}); write the class as text") from error


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(ascii(str(key)[:30]) for key in list(value)[:5]) or 'nothing'}"
    if isinstance(value, (list, tuple)):
        shown = [ascii(each)[:20] if isinstance(each, (str, int, float)) else "..." for each in value[:4]]
        return f"a list of {len(value)}, {', '.join(shown)}"
    return f"{type(value).__name__} {ascii(value)[:60]}"
