"""The account of a source: what ingest understood of it, and what looks odd; counts and words, no lists of images.

It is stored beside the raw tars (`source.json`): the same for the same source, however it was read. The validation
page and the model card show it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stages.data.raw.images import IMAGE_SUFFIXES
from stages.data.sources.dispatch import Source
from stages.data.sources.oddities import odd_classes, odd_counts, odd_files, odd_folders, odd_groups, some
from stages.data.sources.parts import SPLITS, Image, LeftOut, Name, Noted, ShardPart
from stages.data.validation.class_order import class_order

LONGEST = 60
"""Characters of a file's name that are shown."""
KINDS = 6
"""Of what is left out or noted, in words."""
FIRST = 3
"""Classes that are named, before the last one."""
BELOW = 4
"""Folders below a class folder that are remembered."""
NO_IMAGE = "file whose name is not an image's; its bytes decide"
NO_GROUP = "image in no group; it is its own"
NO_SUFFIX = "file without a suffix; its bytes decide"


class Counted(NamedTuple):
    """How many files something is said of, and the name of the first one."""

    files: int
    name: str


@dataclass
class Seen:
    """What parts held, in counts; `join` them in the order of the parts."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Images that are taken, by split and class as the source has them; the class is empty where one has none."""
    titles: dict[str, str] = field(default_factory=dict)
    """What the source calls a class, where that is not its name."""
    left_out: dict[str, Counted] = field(default_factory=dict)
    noted: dict[str, Counted] = field(default_factory=dict)
    not_chosen: int = 0
    """Images that the source has and its query does not take."""
    groups: dict[str, int] = field(default_factory=dict)
    """Images of each group, where the source's query asks for groups."""
    suffixes: dict[str, int] = field(default_factory=dict)
    below: dict[str, list[str]] = field(default_factory=dict)
    """Folders inside each class folder; an empty name stands for files in the class folder itself."""

    @property
    def classes(self) -> set[str]:
        """With the empty one, where an image has none."""
        return {name for counts in self.counts.values() for name in counts}

    def see(self, item: Image | Name | LeftOut | Noted, taken: bool) -> None:
        """Counts one item of a part."""
        if isinstance(item, LeftOut):
            _add(self.left_out, item.why, Counted(item.files, item.name))
        elif isinstance(item, Noted):
            _add(self.noted, item.what, Counted(item.files, item.name))
        elif not taken:
            self.not_chosen += 1
        else:
            of_split = self.counts.setdefault(item.split, {})
            of_split[item.class_name] = of_split.get(item.class_name, 0) + 1
            self._see_name(item.class_name, item.name)
            if item.title:
                self.titles[item.class_name] = item.title

    def _see_name(self, class_name: str, name: str) -> None:
        folder, _, base = name.rpartition("/")
        _, dot, suffix = base.rpartition(".")
        suffix = f".{suffix.lower()}" if dot else ""
        if suffix not in IMAGE_SUFFIXES:
            _add(self.noted, NO_IMAGE if suffix else NO_SUFFIX, Counted(1, f"{class_name}/{name}".strip("/")))
            suffix = "others" if suffix else "no suffix"
        self.suffixes[suffix] = self.suffixes.get(suffix, 0) + 1
        self._see_folder(class_name, folder.partition("/")[0])

    def _see_folder(self, class_name: str, folder: str) -> None:
        below = self.below.setdefault(class_name, [])
        if folder not in below and (len(below) < BELOW or not folder):
            below.append(folder)

    def see_group(self, name: str, group: str | None) -> None:
        """Counts the group of an image that is taken; None: nobody asked for groups."""
        if group:
            self.groups[group] = self.groups.get(group, 0) + 1
        elif group is not None:
            _add(self.noted, NO_GROUP, Counted(1, name))

    def join(self, other: "Seen") -> None:
        """Takes in what a later part held."""
        for split, counts in other.counts.items():
            self.counts[split] = dict(Counter(self.counts.get(split, {})) + Counter(counts))
        self.titles |= other.titles
        for own, others in ((self.left_out, other.left_out), (self.noted, other.noted)):
            for why, example in others.items():
                _add(own, why, example)
        for class_name, folders in other.below.items():
            for folder in folders:
                self._see_folder(class_name, folder)
        self.not_chosen += other.not_chosen
        self.groups = dict(Counter(self.groups) + Counter(other.groups))
        self.suffixes = dict(Counter(self.suffixes) + Counter(other.suffixes))

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Seen":
        """As `vars` gave it, from JSON."""
        kinds = {kind: {why: Counted(*of) for why, of in stored[kind].items()} for kind in ("left_out", "noted")}
        return cls(**stored | kinds)


def account(source: Source, seen: Seen, read: str = "") -> dict[str, Any]:
    """The account as plain values: counts, and `understood` and `odd` in words.

    Args:
        source: as it was listed.
        seen: of all its parts.
        read: how much of it, where that is not all; empty: all.
    """
    counts = {split: seen.counts[split] for split in (*SPLITS, "all") if split in seen.counts}
    if source.choice.unlabelled:
        counts = {split: {"": sum(of_split.values())} for split, of_split in counts.items()}
    shards = any(isinstance(part, ShardPart) for part in source.parts)
    classes = class_order({name for of_split in counts.values() for name in of_split} - {""})
    values: dict[str, Any] = {
        "layout": source.layout,
        "read": read,
        "chosen": source.chosen,
        "images": sum(sum(of_split.values()) for of_split in counts.values()),
        "not_taken": {"classes": source.classes_left, "images": seen.not_chosen},
        "unlabelled": sum(of_split.get("", 0) for of_split in counts.values()),
        "splits": {split: sum(of_split.values()) for split, of_split in counts.items()},
        "classes": {"count": len(classes), "first": classes[:FIRST], "last": classes[FIRST:][-1:]},
        "groups": _groups(source.grouping.text, seen.groups),
        "suffixes": dict(sorted(seen.suffixes.items(), key=lambda item: (-item[1], item[0]))),
        "left_out": _plain(seen.left_out, source.left_out),
        # Rows of Parquet often have no name.
        "noted": _plain({what: each for what, each in seen.noted.items() if what != NO_SUFFIX or not shards}),
        "notes": list(source.notes),
        "titles": dict(sorted(seen.titles.items())),
    }
    return values | {"understood": understood(values), "odd": list(_odd(source, seen, values, counts))}


def understood(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The account in words: a label and a text each."""
    images, unlabelled, classes, titles = (values[key] for key in ("images", "unlabelled", "classes", "titles"))
    splits = ", ".join(f"{split} {count:,}" for split, count in values["splits"].items())
    labels = f"{unlabelled:,} of {images:,} images have none" if classes["count"] else "none"
    lines = [
        ("layout", values["layout"]),
        ("read", values["read"]),
        ("chosen", _chosen(values)),
        ("images", f"{images:,}, without splits" if splits.startswith("all ") else f"{images:,}: {splits}"),
        ("labels", labels if unlabelled else "every image has one"),
        ("classes", _classes(classes)),
        ("groups", _groups_in_words(values["groups"])),
        ("renamed", some(f"{title} is kept as {name}" for name, title in titles.items())),
        ("files", _files(values["suffixes"], images)),
        *(("read as", note) for note in values["notes"]),
        *(("noted", text) for text in _counted(values["noted"])),
        *(("left out", text) for text in _counted(values["left_out"])),
    ]
    lines += [] if values["left_out"] else [("left out", "nothing")]
    return [(label, _printable(text)) for label, text in lines if text]


def as_text(values: dict[str, Any]) -> str:
    """The account for a terminal: a line each, odd things last."""
    lines = [f"  {label:<9} {text}" for label, text in values["understood"]]
    return "\n".join(lines + [f"  odd       {each}" for each in values["odd"]])


def _odd(source: Source, seen: Seen, values: dict[str, Any], counts: dict[str, dict[str, int]]) -> Iterator[str]:
    """A sentence for each thing that looks odd; counts are not judged where only the beginning was read."""
    classes = class_order({name for of_split in counts.values() for name in of_split} - {""})
    yield from odd_classes(classes)
    if not values["read"]:
        yield from odd_groups(values["groups"])
        yield from odd_counts(counts, classes, few_asked=source.choice.limits is not None)
    shards = any(isinstance(part, ShardPart) for part in source.parts)
    if classes and not shards:
        yield from odd_folders({name: below for name, below in seen.below.items() if "" not in below}, len(classes))
    if shards and not classes and values["images"] and not source.choice.unlabelled:
        yield "no sample has a label; archives of class folders, which are read by the names of folders, go one by one"
    left_out = sum(each["files"] for each in values["left_out"].values())
    no_images = values["noted"].get(NO_IMAGE, {}).get("files", 0)
    yield from odd_files(left_out, values["images"], no_images)


def _classes(classes: dict[str, Any]) -> str:
    names = classes["first"] + classes["last"]
    if not names:
        return ""
    order = "numbered by their value" if all(map(str.isdecimal, names)) else "in the order of their names"
    gap = ", ..." if classes["count"] > len(names) else ""
    first = ", ".join(classes["first"])
    return f"{classes['count']:,}, {order}: {first}{gap}" + "".join(f", {name}" for name in classes["last"])


def _groups(asked: str, groups: dict[str, int]) -> dict[str, Any]:
    """Empty where nobody asked for groups."""
    largest = max(sorted(groups), key=groups.__getitem__, default="")
    counts = {"count": len(groups), "images": sum(groups.values()), "largest": groups.get(largest, 0)}
    return counts | {"by": asked, "name": largest} if asked else {}


def _groups_in_words(groups: dict[str, Any]) -> str:
    if not groups:
        return "none (nobody asked for them: ?group=)"
    largest = f"; the largest, {groups['name']}, has {groups['largest']:,}" if groups["count"] else ""
    return f"{groups['count']:,}, with {groups['images']:,} images, by {groups['by']}{largest}"


def _files(suffixes: dict[str, int], images: int) -> str:
    if suffixes.keys() <= {"no suffix"}:
        return ""
    seen = sum(suffixes.values())
    some_of = f"of {seen:,} names read: " if seen < images else ""
    return some_of + ", ".join(f"{suffix} {count:,}" for suffix, count in suffixes.items())


def _chosen(values: dict[str, Any]) -> str:
    classes, images = values["not_taken"]["classes"], values["not_taken"]["images"]
    others = [f"{classes:,} whole classes"] if classes else []
    others += [f"{images:,} images"] if images else []
    return values["chosen"] + (f"; not taken: {' and '.join(others)}" if others else "")


def _counted(kinds: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A text a kind, those of most files first; of many kinds, the others are one."""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1]["files"], item[0]))
    for why, each in ordered[:KINDS]:
        files, name = each["files"], each["name"]
        name = name if len(name) <= LONGEST else f"...{name[-LONGEST:]}"
        yield f"{files:,} × {why} ({name}{', ...' if files > 1 else ''})"
    if others := ordered[KINDS:]:
        yield f"{sum(each['files'] for _, each in others):,} × {len(others):,} other kinds"


def _plain(counted: dict[str, Counted], listed: Iterable[LeftOut] = ()) -> dict[str, dict[str, Any]]:
    """Sorted, together with what was left out when the source was listed."""
    found: dict[str, Counted] = {}
    for item in listed:
        _add(found, item.why, Counted(item.files, item.name))
    for why, each in counted.items():
        _add(found, why, each)
    return {why: found[why]._asdict() for why in sorted(found)}


def _add(counts: dict[str, Counted], why: str, example: Counted) -> None:
    before = counts.get(why) or Counted(0, _printable(example.name))
    counts[why] = Counted(before.files + example.files, before.name)


def _printable(text: str) -> str:
    """Hidden files and titles are as their source has them, and go to terminals and pages."""
    return "".join(each if each.isprintable() else "?" for each in text)
