"""Edits and merges `batches` and `retrain.retracted` in the text of params.yaml; all other lines stay as they are.

PyYAML tells where a value begins and ends; only the text between is changed. An entry of `batches` consists of its
lines and the comments above it.
"""

import json
import subprocess
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from stages.runtime.command import StageError
from stages.runtime.yaml_text import dump_yaml, parse_yaml

T = TypeVar("T")
_MISSING = object()


@dataclass
class Entries:
    """The section `batches` of a text: its lines `start` to `end` (exclusive), their header, and each entry's text."""

    start: int
    end: int
    header: str
    texts: dict[str, str] = field(default_factory=dict)
    indent: int = 2


def batches(text: str) -> dict[str, Any]:
    """The plain values of `batches`, in order of arrival; none where there is no text."""
    return dict((_load(text).get("batches") or {}) if text else {})


def retracted(text: str) -> list[str]:
    """The names in `retrain.retracted`."""
    return list((_load(text).get("retrain") or {}).get("retracted") or []) if text else []


def with_batch(text: str, name: str, value: dict[str, str]) -> str:
    """The text with one more batch, as the last."""
    entries = _entries(text)
    entries.texts[name] = _entry(name, value, entries.indent)
    return _rebuilt(text, entries)


def without_batch(text: str, name: str) -> str:
    """The text without a batch and without the comments above it."""
    entries = _entries(text)
    del entries.texts[name]
    return _rebuilt(text, entries)


def with_retracted(text: str, names: list[str]) -> str:
    """The text with `names` as `retrain.retracted`."""
    value = json.dumps(names)
    section = _value(_composed(text), "retrain")
    if not isinstance(section, yaml.MappingNode):
        raise StageError("params.yaml: the section `retrain` is missing")
    for key, node in section.value:
        if key.value == "retracted":
            return f"{text[: key.end_mark.index]}: {value}{text[_last(node).index :]}"
    if section.flow_style:
        at = section.end_mark.index - 1
        return f"{text[:at]}{', ' if section.value else ''}retracted: {value}{text[at:]}"
    at = _last(section).index
    return f"{text[:at]}\n{' ' * section.start_mark.column}retracted: {value}{text[at:]}"


# -------------------------------------------------------------------------------------------------------- three ways


def merge(ancestor: str, ours: str, theirs: str) -> str:
    """Merges params.yaml of two branches: their batches by name, the rest as git does.

    Ours come first, in our order, then what is new in theirs. What one side removed or changed since the ancestor is
    removed or changed. A batch that was taken back stays away, even if the other side has it as new (after a squashed
    merge, say).

    Raises:
        StageError: both sides changed the same thing in different ways.
    """
    names = _unite_names(retracted(ancestor), retracted(ours), retracted(theirs))
    entries = _unite(ancestor, ours, theirs, without=names)
    same = [_rebuilt(text, entries, _entries(text)) if text else "" for text in (ours, ancestor, theirs)]
    return _merge_file(*(with_retracted(text, names) if text else "" for text in same))


def three_way(ancestor: T, ours: T, theirs: T) -> T | None:
    """The merged value; None where both sides changed it in different ways."""
    if ours in (ancestor, theirs):
        return theirs
    return ours if theirs == ancestor else None


def _unite(ancestor: str, ours: str, theirs: str, without: list[str]) -> Entries:
    before, own, other = batches(ancestor), batches(ours), batches(theirs)
    own_entries, other_entries = _entries(ours), _entries(theirs)
    united: dict[str, str] = {}
    for name in dict.fromkeys([*own, *other]):
        if name in without:
            continue
        values = [each.get(name, _MISSING) for each in (before, own, other)]
        kept = three_way(*values)
        if kept is None:
            raise StageError(f"params.yaml: `batches.{name}` was changed on both sides in different ways")
        if kept is not _MISSING:
            entries = own_entries if kept == own.get(name, _MISSING) else other_entries
            united[name] = _indented(entries.texts[name], own_entries.indent - entries.indent)
    own_entries.texts = united
    return own_entries


def _unite_names(ancestor: list[str], ours: list[str], theirs: list[str]) -> list[str]:
    every = dict.fromkeys([*ours, *theirs])
    return [name for name in every if three_way(name in ancestor, name in ours, name in theirs)]


def _merge_file(ours: str, ancestor: str, theirs: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("ours", "ancestor", "theirs")]
        for path, text in zip(paths, (ours, ancestor, theirs), strict=True):
            path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["git", "merge-file", "--stdout", *map(str, paths)], capture_output=True, encoding="utf-8", check=False
        )
    if done.returncode:
        raise StageError("params.yaml was changed on both sides in the same lines")
    return done.stdout


def merge_lock(ancestor: str, ours: str, theirs: str) -> str:
    """Merges dvc.lock of two branches, stage by stage; ours where both changed one: it is run again anyway."""
    before, own, other = (dict(yaml.safe_load(text) or {}) if text else {} for text in (ancestor, ours, theirs))
    stages: dict[str, Any] = {}
    for name in dict.fromkeys([*own.get("stages", {}), *other.get("stages", {})]):
        values = [each.get("stages", {}).get(name) for each in (before, own, other)]
        stage = values[2] if values[1] == values[0] else values[1]
        if stage is not None:
            stages[name] = stage
    merged = {"schema": "2.0", **own, "stages": stages}
    return ours if merged == own else _dumped(merged)


def lock_of(lock: str, names: list[str]) -> str:
    """dvc.lock without the stages of batches other than `names`: DVC would keep them for ever."""
    content = yaml.safe_load(lock) if lock else None
    if not content:
        return lock
    gone = [stage for stage in content["stages"] if "@" in stage and stage.partition("@")[2] not in names]
    for stage in gone:
        del content["stages"][stage]
    return _dumped(content) if gone else lock


def _dumped(lock: dict[str, Any]) -> str:
    return yaml.safe_dump(lock, sort_keys=False, width=10_000, allow_unicode=True)


# ----------------------------------------------------------------------------------------------------------- the text


def _load(text: str) -> dict[str, Any]:
    values = parse_yaml(text, "params.yaml")
    return values if isinstance(values, dict) else {}


def _composed(text: str) -> Any:
    """The nodes of the text, with their places in it.

    Raises:
        StageError: PyYAML, which tells the places, does not read it, though DVC may.
    """
    try:
        return yaml.compose(text)
    except yaml.YAMLError as error:
        raise StageError(f"params.yaml cannot be edited: {error}") from None


def _entries(text: str) -> Entries:
    """The section `batches`, read line by line; if it is in braces, its entries are rewritten as lines."""
    root = _composed(text)
    key = next((key for key, _ in root.value if key.value == "batches"), None) if root else None
    section = _value(root, "batches")
    if key is None or not isinstance(section, yaml.MappingNode) or not section.value:
        raise StageError("params.yaml: `batches` must name at least one batch")
    lines = text.splitlines(keepends=True)
    start = key.start_mark.line
    if section.flow_style:
        values = batches(text)
        texts = {name: _entry(name, value, 2) for name, value in values.items()}
        return Entries(start, _last(section).line + 1, "batches:\n", texts)
    entries = Entries(start, start + 1, lines[start], indent=section.value[0][0].start_mark.column)
    for name, value in section.value:
        mark = _last(value)
        end = mark.line + (1 if mark.column else 0)  # a block of text ends where the line after it begins
        entries.texts[name.value] = "".join(lines[entries.end : end])
        entries.end = end
    return entries


def _rebuilt(text: str, entries: Entries, place: Entries | None = None) -> str:
    """The text with the section at `place` (default: where it came from) replaced."""
    place = place or entries
    lines = text.splitlines(keepends=True)
    ends = [each if each.endswith("\n") else f"{each}\n" for each in entries.texts.values()]
    return "".join([*lines[: place.start], entries.header, *ends, *lines[place.end :]])


def _entry(name: str, value: dict[str, Any], indent: int) -> str:
    # A line a key, and quotes only where they are needed: DVC writes it the same way when it changes another value.
    return textwrap.indent(dump_yaml({name: value}), " " * indent)


def _indented(text: str, by: int) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(" " * by + line if by >= 0 else line.removeprefix(" " * -by) for line in lines)


def _value(node: Any, key: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), None)


def _last(node: Any) -> Any:
    """Where a value's own text ends. For a block, PyYAML gives the start of whatever follows it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last(last[1] if isinstance(last, tuple) else last)
    return node.end_mark
