"""URIs of sources: an address with a query, and the files that its patterns stand for."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from stages.data.sources.locations import Location
from stages.runtime.command import StageError

SUBSET = {"seed", "classes", "num_classes", "images_per_class", "unlabelled"}
"""Keys that every source has: which of its images are taken (subset.py)."""
GROUP = "group"
"""A key that every source has: which images belong together (grouping.py)."""
CHECKSUMS = {"sha256": 64, "md5": 32}
"""Digits of each, in hex."""
MARK = re.compile(r"\?(?=\w+=|$)")
ENDS_IN_GROUP = re.compile(r"[?&]group=[^&]*\?$")
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".zip")


@dataclass(frozen=True)
class SourceUri:
    """`sample:target?seed=1`, `path/to/folder?images_per_class=50&classes=a,b`, `https://host/x.tgz?sha256=...`."""

    text: str
    address: str
    query: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "SourceUri":
        """Splits the query off, at the last `?` that a key follows, or nothing: a URL may have a query of its own.

        In `group`, a regular expression, `+` is no blank.
        """
        found = [mark.start() for mark in MARK.finditer(text)]
        if not found:
            return cls(text, text)
        # A regular expression may end in a question mark.
        start = found[-2] if found[-1] == len(text) - 1 and ENDS_IN_GROUP.search(text) and len(found) > 1 else found[-1]
        query = dict(parse_qsl(text[start + 1 :], keep_blank_values=True))
        for key, _, value in (pair.partition("=") for pair in text[start + 1 :].split("&")):
            query |= {GROUP: unquote(value)} if key == GROUP else {}
        return cls(text, text[:start], query)

    def check(self, *known: str) -> None:
        """Refuses keys that mean nothing for this kind of source.

        Raises:
            StageError: it has one.
        """
        if unknown := set(self.query) - {*known, *SUBSET, GROUP}:
            names, allowed = ", ".join(sorted(unknown)), ", ".join(sorted({*known, *SUBSET, GROUP}))
            hint = "; a URL that has a query of its own ends in another `?`" if "://" in self.address else ""
            raise StageError(f"source {self.text}: unknown {names} after the `?` (known here: {allowed}){hint}")

    def number(self, key: str, least: int) -> int | None:
        """A whole number.

        Raises:
            StageError: it is none, or less than `least`.
        """
        text = self.query.get(key)
        if text is None:
            return None
        if not text.isdecimal() or int(text) < least:
            raise StageError(f"source {self.text}: `{key}` must be a whole number from {least} on, got {text!r}")
        return int(text)

    def unlabelled(self) -> str:
        """`true`: labels are not read. `skip`: images without a label are left out. `false`, or not given: neither.

        Raises:
            StageError: it is something else.
        """
        text = self.query.get("unlabelled", "false")
        if text not in ("true", "false", "skip"):
            raise StageError(f"source {self.text}: `unlabelled` must be true, false or skip, got {text!r}")
        return text

    def checksum(self) -> tuple[str, str] | None:
        """Algorithm and value of the one that is given.

        Raises:
            StageError: it cannot be one.
        """
        for algorithm, digits in CHECKSUMS.items():
            if (value := self.query.get(algorithm)) is not None:
                if not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", value):
                    raise StageError(f"source {self.text}: `{algorithm}` must be {digits} hex digits, got {value!r}")
                return algorithm, value.lower()
        return None

    def classes(self, incoming: Path | str) -> frozenset[str] | None:
        """The classes that are asked for: `a,b`, or those in a file, a line each: `@file`, relative to `incoming`.

        Raises:
            StageError: the file cannot be read.
        """
        text = self.query.get("classes")
        if text and text.startswith("@"):
            return frozenset(filter(None, map(str.strip, Location.of(text[1:], incoming).lines())))
        return frozenset(text.split(",")) if text else None

    def class_names(self, incoming: Path | str) -> tuple[str, ...] | None:
        """The names of numbered classes: a file, a line a class, relative to `incoming`.

        Raises:
            StageError: the file cannot be read.
        """
        text = self.query.get("class_names")
        return tuple(map(str.strip, Location.of(text, incoming).lines())) if text else None


def expanded(uri: SourceUri, location: Location) -> list[Location]:
    """The files that `name-{000..146}.tar` and `*` stand for, sorted.

    Raises:
        StageError: there is none.
    """
    found: list[Location] = []
    for address in _braces(uri, location.address):
        found += _globbed(Location(address)) if "*" in address else [Location(address)]
    if not found:
        raise missing_source(uri, f"files {location}")
    for shard in found:
        if not shard.name.partition("?")[0].lower().endswith((".parquet", *ARCHIVES)):
            raise StageError(f"source {uri.text}: {shard} is neither a Parquet file nor a tar nor a zip")
        if "*" not in location.address and not shard.is_file():
            raise missing_source(uri, f"the file {shard}")
    return sorted(set(found), key=str)


def _braces(uri: SourceUri, text: str) -> list[str]:
    head, brace, rest = text.partition("{")
    if not brace:
        return [text]
    inner, closed, tail = rest.partition("}")
    if not closed:
        raise StageError(f"source {uri.text}: a `{{` without `}}`")
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if bounds and int(bounds[2]) - int(bounds[1]) >= 10**6:
        raise StageError(f"source {uri.text}: {inner} are too many files")
    middles = inner.split(",")
    if bounds:
        middles = [f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    return [head + middle + end for middle in middles for end in _braces(uri, tail)]


def _globbed(location: Location) -> list[Location]:
    if location.is_local:
        pattern = Path(location.address)
        return [Location(str(path)) for path in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))]
    filesystem, path = location.filesystem()
    return [Location(filesystem.unstrip_protocol(each)) for each in filesystem.glob(path)]


def missing_source(uri: SourceUri, what: str) -> StageError:
    """The message for a source that is not there."""
    return StageError(
        f"no such source: {uri.text} (looked for {what}; relative ones resolve against SYNSET_INCOMING). "
        f"If this batch was ingested before, `dvc pull` brings its raw tars back"
    )
