"""Previews a source: its account from listings and names, and a few images, in seconds; nothing is written.

Class folders are counted as a whole, as listing them is cheap. Of archives and shards, whose names come only by reading
them, the beginning is read.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import yaml

from stages.data.raw.images import decode_strictly, read_header
from stages.data.sources.account import Seen, account, as_text
from stages.data.sources.dispatch import Source, read_source
from stages.data.sources.fitness import check_fitness
from stages.data.sources.locations import Location
from stages.data.sources.parts import Image, Name, Part
from stages.data.sources.uri import SourceUri

NAMES, SECONDS = 100_000, 8.0
"""After so many names or so long, reading them ends."""
OPENED = 16
"""Images that are decoded, a few of each of parts that lie far apart."""
LARGEST_OPENED = 2**26
COSTLY = ("num_classes", "images_per_class")
"""Keys of a query that ingest can follow only after it has read all names."""


@dataclass
class Budget:
    """How much of a source is still read."""

    names: int = NAMES
    ends: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    def is_left(self) -> bool:
        """Whether to go on."""
        return self.names > 0 and time.monotonic() < self.ends

    def take(self) -> bool:
        """One name is read: whether to go on."""
        self.names -= 1
        return self.is_left()


def preview(text: str, incoming: Path | str) -> str:
    """What ingest would understand of a source, which role fits, and the lines of params.yaml for it.

    Args:
        text: as in params.yaml; or a path as the shell has it, where `incoming` holds no such.
        incoming: folder or URL that relative sources resolve against.

    Raises:
        StageError: ingest would stop; the message is the same.
    """
    text = _found_here(text, incoming)
    source = read_source(_without(text, COSTLY), incoming, Budget().take)
    seen, read = _names(source, Budget())
    if not read:
        check_fitness(source, seen)
    values = account(source, seen, read)
    values["understood"] += _remarks(text, source)
    return f"{text}\n{as_text(values)}\n\n{_advice(text, values)}"


def _found_here(text: str, incoming: Path | str) -> str:
    """A path from the working directory becomes absolute, as params.yaml needs it."""
    uri = SourceUri.parse(text)
    here = Path(uri.address)
    if "://" in text or uri.address.startswith("sample:") or not here.exists():
        return text
    there = Location.of(uri.address, incoming)
    return text if there.is_folder() or there.is_file() else text.replace(uri.address, str(here.absolute()), 1)


def _without(text: str, keys: tuple[str, ...]) -> str:
    uri = SourceUri.parse(text)
    if uri.address.startswith("sample:") or not uri.query.keys() & set(keys):
        return text
    rest = {key: value for key, value in uri.query.items() if key not in keys}
    return uri.address + (f"?{urlencode(rest, safe='@,/:', quote_via=quote)}" if rest else "")


def _names(source: Source, budget: Budget) -> tuple[Seen, str]:
    """The names of the parts, first one part of each split; and how much was read, empty if all."""
    whole, seen = 0, Seen()
    for part in _spread(source.parts):
        if _see_names(source, part, seen, budget):
            whole += 1
    if whole == len(source.parts):
        return seen, ""
    images = sum(sum(counts.values()) for counts in seen.counts.values())
    where = f"{whole:,} of {len(source.parts):,} files and " if len(source.parts) > 1 else ""
    return seen, f"{where}the beginning only ({images:,} images), as reading the names of all takes long"


def _see_names(source: Source, part: Part, seen: Seen, budget: Budget) -> bool:
    """Whether all of the part was counted: by its names, or from its listing where time is over."""
    read = 0
    for item in part.names() if budget.is_left() else ():
        taken = source.choice.takes(item)
        seen.see(item, taken)
        if isinstance(item, Name) and taken:
            seen.see_group(item.name, source.group_of(item))
        read += isinstance(item, Name)
        budget.names -= 1
        if not budget.is_left():
            break
    else:
        if budget.is_left():
            return True
    if part.file_count is None or part.whole_class is None:
        return False
    split, class_name = part.whole_class
    of_split = seen.counts.setdefault(split, {})
    of_split[class_name] = of_split.get(class_name, 0) + part.file_count - read
    return True


def _spread(parts: list[Part]) -> Iterator[Part]:
    """All parts; the first of each split before all others."""
    first = {getattr(part, "split", ""): number for number, part in reversed(list(enumerate(parts)))}
    yield from (parts[number] for number in sorted(first.values()))
    yield from (part for number, part in enumerate(parts) if number not in first.values())


def _remarks(text: str, source: Source) -> list[tuple[str, str]]:
    uri = SourceUri.parse(text)
    costly = [f"{key}={uri.query[key]}" for key in COSTLY if key in uri.query]
    remarks = [("chosen", f"{', '.join(costly)}: not applied here, as all names must be read first")]
    return (remarks if costly and not uri.address.startswith("sample:") else []) + [("opened", _opened(source))]


def _opened(source: Source) -> str:
    """What a few images are like."""
    step = max(len(source.parts) // OPENED, 1)
    parts = source.parts[::step][:OPENED]
    kinds: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    failed: list[str] = []
    for part in parts:
        for image in islice((item for item in part.images() if isinstance(item, Image)), OPENED // len(parts)):
            kinds[_kind(image, sizes, failed)] += 1
    text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    text += f" ({failed[0]})" if failed else ""
    if not sizes:
        return text
    smallest, largest = (f"{width} × {height}" for width, height in (min(sizes), max(sizes)))
    return f"{text}; {smallest}{f' to {largest}' if largest != smallest else ''} pixels"


def _kind(image: Image, sizes: list[tuple[int, int]], failed: list[str]) -> str:
    """Format and mode; adds the size, or why it does not decode."""
    if image.size > LARGEST_OPENED:
        return "too large to open here"
    data = image.data.read(image.size)
    header = read_header(data)
    try:
        decode_strictly(data, header)
    except ValueError as error:
        failed.append(f"{image.name}: {error}")
        return "not readable"
    sizes.append((header.width, header.height))
    return f"{header.format} {header.mode}"


def _advice(text: str, values: dict[str, Any]) -> str:
    labelled = values["classes"]["count"] > 1
    why = "or pretrain, for the backbone alone" if labelled else "finetune needs labels of two classes or more"
    role = "finetune" if labelled else "pretrain"
    batch = {_batch_name(text): {"role": role, "source": text}}
    lines = yaml.safe_dump({"batches": batch}, sort_keys=False, allow_unicode=True, width=10_000)
    return f"role: {role} ({why})\nin params.yaml:\n\n{lines.rstrip()}"


def _batch_name(text: str) -> str:
    last = SourceUri.parse(text).address.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition(":")[2]
    name = re.sub(r"[^a-z0-9_]+", "-", last.partition(".")[0].lower()).strip("-_")[:60]
    return name if name[:1].isalpha() else f"b-{name}".rstrip("-")
