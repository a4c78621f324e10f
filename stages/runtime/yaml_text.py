"""YAML with one meaning: read as DVC reads it, and refused where another reader would take a value for another.

DVC reads params.yaml with ruamel.yaml, as YAML 1.2: `1e-3` is a number. PyYAML, and with it most other tools in Python,
reads YAML 1.1: there `1e-3` is text, `010` is 8, `yes` is true and `1:30` is 90.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode

from stages.runtime.command import StageError

_TEXT = "tag:yaml.org,2002:str"
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_VERSION = re.compile(r"^%YAML\b", re.MULTILINE)


def parse_yaml(text: str, where: str) -> Any:
    """The plain values of one document, as DVC reads them; None where there is nothing.

    Args:
        where: what messages call the text: a path, `main:params.yaml`.

    Raises:
        StageError: it is not YAML, a key is there twice, or a value has another meaning in YAML 1.1; the message names
            the line.
    """
    if _VERSION.search(text):
        raise StageError(f"{where}: remove the line `%YAML`: DVC reads and writes YAML 1.2, whatever it says")
    try:
        _check_meanings(YAML(typ="safe").compose(text))
        return YAML(typ="safe").load(text)
    except StageError as error:
        raise StageError(f"{where}: {error}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise StageError(f"{where}{line} is not valid YAML: {_problem(error)}") from None
    except (YAMLError, ValueError) as error:  # ValueError: a date in month 13, say
        raise StageError(f"{where} is not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise StageError(f"{where} is not valid YAML: too deep") from None


def dump_yaml(values: Any) -> str:
    """The text of plain values, which every reader reads alike; keys stay in order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def is_plain_text(value: str) -> bool:
    """Whether every reader takes it for text without quotes, as far as its meaning is concerned."""
    return _meaning_in_1_1(value)[0] == _meaning_in_1_2(value) == _TEXT


class _Dumper(yaml.SafeDumper):
    """Quotes what is text to PyYAML and a number to DVC."""

    def represent_text(self, value: str) -> yaml.ScalarNode:
        """A scalar, in quotes where a reader would not take it for text."""
        style = None if is_plain_text(value) else "'"
        return self.represent_scalar(_TEXT, value, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _problem(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context).splitlines()[0]
    hint = "; put a text with a colon in quotes" if "':'" in problem or "mapping values" in problem else ""
    return problem + hint


def _check_meanings(root: Any) -> None:
    """Raises StageError for the first key or value whose meaning depends on the reader."""
    for path, node in _scalars(root, "", set()):
        if node.style not in (None, ""):
            continue  # in quotes, or a block of text
        before, now = _meanings(node.value, node.tag)
        if before != now:
            plain = now if before == "text" else before if now == "text" else f"{now} (or {before})"
            raise StageError(
                f"line {node.start_mark.line + 1}: `{path}` has {node.value}, which is {before} in YAML 1.1 "
                f"and {now} in YAML 1.2; write {plain}, or, if it is text, '{node.value}' in quotes"
            )


def _meanings(text: str, tag: str) -> tuple[str, str]:
    """In words, what a scalar without quotes is in YAML 1.1 and 1.2; alike where no reader takes it for another value.

    `1e-3` is alike: 1.1 calls it text, but nobody reads another number.
    """
    before, value = _meaning_in_1_1(text)
    if tag.endswith(":int") and _LEADING_ZERO.fullmatch(text):
        return "text" if before == _TEXT else str(value), str(int(text.replace("_", "")))
    if tag == _TEXT and before.endswith((":int", ":float", ":bool")):
        return str(value).lower(), "text"
    return "", ""


def _check_keys(mapping: Any) -> None:
    """Raises StageError for a key that is there twice; PyYAML would silently keep the last one."""
    seen: dict[Any, Any] = {}
    for key, _ in mapping.value:
        first = seen.setdefault((key.tag, key.value), key) if key.id == "scalar" else key
        if first is not key:
            places = [each.start_mark.line + 1 for each in (first, key)]
            raise StageError(f"a key is there twice: first in line {places[0]}, then `{key.value}` in line {places[1]}")


def _scalars(node: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Every key and value, once, with its dotted path."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if node.id == "scalar":
        yield path, node
        return
    if node.id == "mapping":
        _check_keys(node)
    for at, each in enumerate(node.value):
        key, value = each if node.id == "mapping" else (None, each)
        name = key.value if key is not None and key.id == "scalar" else str(at)
        below = f"{path}.{name}" if path else name
        if key is not None:
            yield from _scalars(key, below, seen)
        yield from _scalars(value, below, seen)


_IN_1_1 = yaml.resolver.Resolver()
_IN_1_2 = YAML(typ="safe").resolver


def _meaning_in_1_2(text: str) -> str:
    return str(_IN_1_2.resolve(ScalarNode, text, (True, False)))


def _meaning_in_1_1(text: str) -> tuple[str, Any]:
    """Tag and value of a scalar without quotes."""
    tag = _IN_1_1.resolve(yaml.ScalarNode, text, (True, False))
    if tag == _TEXT or not tag.endswith((":int", ":float", ":bool")):
        return tag, text
    value = yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(tag, text))
    return tag, value
