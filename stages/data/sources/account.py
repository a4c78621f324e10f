"""The account of a source: what ingest understood of it, and what looks odd; counts and words, no lists of images.

It is stored beside the raw tars (`source.json`): the same for the same source, however it was read. The validation
page and the model card show it.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stages.data.sources.dispatch import Source
from stages.data.sources.parts import Image, LeftOut, Name, Noted


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
            if item.title:
                self.titles[item.class_name] = item.title

    def join(self, other: "Seen") -> None:
        """Takes in what a later part held."""
        for split, counts in other.counts.items():
            self.counts[split] = dict(Counter(self.counts.get(split, {})) + Counter(counts))
        self.titles |= other.titles
        for own, others in ((self.left_out, other.left_out), (self.noted, other.noted)):
            for why, example in others.items():
                _add(own, why, example)
        self.not_chosen += other.not_chosen

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Seen":
        """As `vars` gave it, from JSON."""
        kinds = {kind: {why: Counted(*of) for why, of in stored[kind].items()} for kind in ("left_out", "noted")}
        return cls(**stored | kinds)


def account(source: Source, seen: Seen) -> dict[str, Any]:
    """The account as plain values.

    Args:
        source: as it was listed.
        seen: of all its parts.
    """
    for item in source.left_out:
        seen.see(item, False)
    return {
        "layout": source.layout,
        "splits": {split: sum(counts.values()) for split, counts in sorted(seen.counts.items())},
        "notes": list(source.notes),
        "left_out": {why: example._asdict() for why, example in sorted(seen.left_out.items())},
        "noted": {what: example._asdict() for what, example in sorted(seen.noted.items())},
        "titles": dict(sorted(seen.titles.items())),
    }


def _add(counts: dict[str, Counted], why: str, example: Counted) -> None:
    before = counts.get(why)
    counts[why] = Counted(before.files + example.files, before.name) if before else example
