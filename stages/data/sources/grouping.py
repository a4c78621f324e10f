"""Which images of a source belong together (one patient, product or video): the key `group` of its query.

    group=(patient\\d+)_     a regular expression with one pair of brackets, searched in the name below the class folder
    group=folder:1          the first folder below the class folder; `folder:2`: the first two, ...
    group=column:patient    a column of a Parquet source
    group=field:patient     a field of the `.json` of a webdataset sample

A group goes into one split as a whole. Its name is the same group in every batch and role.
"""

import re
from dataclasses import dataclass

from stages.data.sources.uri import SourceUri
from stages.runtime.command import StageError

COLUMN, FIELD = "column", "field"
"""What only the reader of a kind of source can see: its parts yield images with their group."""
LONGEST = 200
"""Characters of a group's name."""


@dataclass(frozen=True)
class Grouping:
    """How a source tells groups; none of the three: not at all, or its parts do."""

    text: str = ""
    pattern: re.Pattern[str] | None = None
    folders: int = 0

    @classmethod
    def of(cls, uri: SourceUri) -> "Grouping":
        """What the query asks for.

        Raises:
            StageError: it is no regular expression, or has not one pair of brackets.
        """
        text = uri.query.get("group")
        if text is None or text.startswith((f"{COLUMN}:", f"{FIELD}:")):
            return cls(text or "")
        if folder := re.fullmatch(r"folder:([1-9]\d?)", text, re.ASCII):
            return cls(text, folders=int(folder[1]))
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise StageError(f"source {uri.text}: `group={text}` is no regular expression ({error}){HOW}") from None
        if pattern.groups != 1:
            raise StageError(f"source {uri.text}: `group={text}` has {pattern.groups} pairs of brackets{HOW}")
        return cls(text, pattern)

    def group_of(self, name: str, told: str) -> str:
        """The group of an image; empty: it is in none.

        Args:
            name: within its class, as it goes into the batch.
            told: the group that its part tells.

        Raises:
            StageError: it cannot name a group.
        """
        group = told
        if self.folders:
            folders = name.split("/")[:-1]
            group = "/".join(folders[: self.folders]) if len(folders) >= self.folders else ""
        elif self.pattern is not None:
            found = self.pattern.search(name)
            group = (found[1] or "") if found else ""
        if len(group) > LONGEST or not group.isprintable():
            raise StageError(
                f"{name}: {group[:LONGEST]!r} cannot name a group (at most {LONGEST} printable characters)"
            )
        return group


HOW = (
    "; expected one pair of brackets around what images of one group have in common, as in `group=(patient\\d+)_` "
    "(`(?:...)` does not count; write & as %26, and % as %25), or folder:N, column:NAME, field:NAME"
)


def group_field(uri: SourceUri, kind: str) -> str | None:
    """The name after `group=column:` or `group=field:`; None where the query has none of this kind.

    Raises:
        StageError: it has one of another kind, or an empty one.
    """
    text = uri.query.get("group", "")
    found, colon, name = text.partition(":")
    if not colon or found not in (COLUMN, FIELD):
        return None
    if found != kind or not name:
        fits = {COLUMN: "a column is of a Parquet source", FIELD: "a field is of webdataset shards"}
        raise StageError(f"source {uri.text}: `group={text}` does not fit: {' and '.join(fits.values())}{HOW}")
    return name
