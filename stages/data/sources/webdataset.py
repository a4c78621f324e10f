"""Webdataset shards: tars in which the files of one sample follow each other, `0001.jpg 0001.cls`."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stages.data.raw.images import SOURCE_SUFFIXES
from stages.data.sources.labels import MISSING, SEVERAL, Label, apart, group_name, label_of, nested, text_label
from stages.data.sources.locations import Hidden, Location
from stages.data.sources.parts import (
    Image,
    LeftOut,
    Listed,
    Name,
    Noted,
    Part,
    ShardPart,
    Unique,
    hidden_files,
    splits_of,
    stamp_of,
)
from stages.data.sources.tars import Member, members, opened
from stages.runtime.command import StageError

LARGEST_HELD = 2**28
"""Bytes of an image. Its label may follow it in the tar, and until then it is held in memory."""
LARGEST_LABEL = 2**20
MOST_LABELS, SHOWN = 16, 6
"""Files of one sample that may be its label, and that a message names."""
DOTS = (
    "Files of one name up to the first dot are one sample: if these are samples of their own, rename them without dots"
)
LABELS = ("cls", "json", "txt")
"""Which file tells the class: the first of these that the sample has."""


class Fields(NamedTuple):
    """Which files of a sample are read, as the source's query tells it."""

    image: str | None = None
    """A field or suffix, `left` or `left.png`; None: the one without a field, or the only one."""
    label: str | None = None
    """A suffix or a path in `.json`, `meta.class`; None: LABELS, and `label` in `.json`."""
    class_names: tuple[str, ...] | None = None
    labelled: bool = True
    group: str | None = None
    """A path in `.json`; None: there are no groups."""


@dataclass
class _Sample:
    """The files of one sample that have come so far."""

    key: str
    suffixes: list[str] = field(default_factory=list)  # the first ones, for messages
    image: str = ""
    data: bytes = b""
    images: int = 0
    labels: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class WebdatasetShard(ShardPart):
    """Samples become `<shard>/<key>.<suffix>`."""

    fields: Fields

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """A sample after the other.

        Raises:
            StageError: the shard is damaged or holds what is refused; a sample has two images, or an odd label.
        """
        yield from _Reading(self, with_bytes=True).items()

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        for item in _Reading(self, with_bytes=False).items():
            if isinstance(item, Image):
                yield Name(item.split, item.class_name, item.name, item.title, item.group)
            else:
                yield item


class _Reading:
    """One pass over a shard."""

    def __init__(self, shard: WebdatasetShard, with_bytes: bool) -> None:
        self._shard, self._fields, self._with_bytes = shard, shard.fields, with_bytes
        self._json_kinds: dict[type, str] = {}
        """The first sample whose label in `.json` is a number, and the first with a name."""
        self._without: dict[str, str] = {}
        """What is said of samples without a label: one text a kind, of its first sample."""

    def items(self) -> Iterator[Image | LeftOut | Noted]:
        location = self._shard.location
        unique, sample, hidden = Unique(str(location)), _Sample(""), Hidden()
        with opened(location) as tar:
            for member in members(tar, str(location), hidden=hidden):
                key, suffix = _key(member.path)
                if sample.key != key:
                    yield from self._whole(sample)
                    unique.check(key)
                    sample = _Sample(key)
                self._take(sample, suffix, member)
            yield from self._whole(sample)
        yield from hidden_files(hidden, f"{self._shard.below}/")

    def _take(self, sample: _Sample, suffix: str, member: Member) -> None:
        where = f"{self._shard.location}: {'/'.join(member.path)}"
        sample.suffixes += [suffix[:40]] if len(sample.suffixes) < SHOWN else []
        kind = suffix.rpartition(".")[2]
        if _is_image(suffix):
            sample.images += 1
            if self._is_chosen(sample, suffix, where):
                if member.size > LARGEST_HELD:
                    raise StageError(f"{where} has {member.size / 2**20:.0f} MiB, and an image of a shard may have 256")
                sample.image, sample.data = suffix, member.data.read() if self._with_bytes else b""
        elif self._is_read(suffix, kind):
            if member.size > LARGEST_LABEL:
                raise StageError(f"{where} has {member.size} bytes, too many for a label")
            if len(sample.labels) == MOST_LABELS:
                raise StageError(f"{where}: its sample has more than {MOST_LABELS} labels. {DOTS}")
            sample.labels[suffix] = member.data.read()

    def _is_read(self, suffix: str, kind: str) -> bool:
        """Whether a file may tell the label or the group."""
        if kind == "json" and self._fields.group is not None:
            return True
        return self._fields.labelled and (kind in LABELS or suffix == self._fields.label)

    def _is_chosen(self, sample: _Sample, suffix: str, where: str) -> bool:
        """Whether this is the sample's image, as far as its files have come."""
        wanted = self._fields.image
        if wanted is None:  # one without a field replaces one with, and of those the first is held
            chosen = "." not in suffix
            second = chosen and bool(sample.image) and "." not in sample.image
            chosen = chosen or not sample.image
        else:
            chosen = wanted in (suffix, suffix.rpartition(".")[0])
            second = chosen and bool(sample.image)
        if second:
            raise StageError(
                f"{where} is the second image of its sample; a sample has one image and one label: "
                f"?image=FIELD chooses one, such as `{suffix}`"
            )
        return chosen

    def _whole(self, sample: _Sample) -> Iterator[Image | LeftOut | Noted]:
        if not sample.suffixes:
            return
        shard, named = self._shard, f"{self._shard.below}/{sample.key}"
        if not sample.image:
            what = f"the image `{self._fields.image}`" if self._fields.image else "an image"
            yield LeftOut(f"{named}.{sample.suffixes[0]}".rstrip("."), f"sample without {what}")
            return
        if sample.images > 1:
            if self._fields.image is None and "." in sample.image:
                raise StageError(
                    f"{shard.location}: the sample {sample.key} has {sample.images} images "
                    f"({', '.join(filter(_is_image, sample.suffixes))}); choose one with ?image=FIELD, such as "
                    f"?image={sample.image.rpartition('.')[0]}. {DOTS}"
                )
            yield LeftOut(f"{named}.{sample.image}", "further image of a sample", sample.images - 1)
        label = self._label(sample)
        if label.noted:
            yield Noted(f"{named}.{sample.image}", label.noted)
        name, group = f"{named}.{sample.image}", self._group(sample)
        data = io.BytesIO(sample.data)
        yield Image(shard.split, label.class_name, name, len(sample.data), data, label.title, group)

    def _group(self, sample: _Sample) -> str:
        if self._fields.group is None:
            return ""
        where, found = f"{self._shard.location}: {sample.key}", MISSING
        for suffix, data in sample.labels.items():
            if suffix.rpartition(".")[2] == "json" and found is MISSING:
                found = nested(self._json(data, f"{where}.{suffix}"), self._fields.group)
        return group_name(found, where)

    def _label(self, sample: _Sample) -> Label:
        if not self._fields.labelled:
            return Label("")
        where, wanted = f"{self._shard.location}: {sample.key}", self._fields.label
        suffix = self._label_file(sample, where)
        if suffix is None:
            what = f"file `{wanted}`, nor a .json" if wanted else ".cls, .json or .txt"
            return self._no_label(f"no {what} (files: {', '.join(sample.suffixes)}; ?label=FIELD names one)", "file")
        hint = "?label=FIELD names another file of the sample, or a field of its .json"
        if suffix.rpartition(".")[2] != "json":
            return text_label(sample.labels[suffix], self._fields.class_names, f"{where}.{suffix}", hint)
        value = self._json(sample.labels[suffix], f"{where}.{suffix}")
        path = wanted or "label"
        if isinstance(value, dict):
            found = nested(value, path)
            if found is MISSING:
                keys = ", ".join(ascii(str(key))[1:-1][:30] for key in sorted(value)[:10]) or "none"
                return self._no_label(f"no `{path}` in its .json (fields: {keys}; ?label=FIELD names one)", "field")
            if isinstance(found, dict) and found:
                hint = f"?label={path}.{ascii(min(found)[:30])[1:-1]} names one of them"
            value = found
        elif value is not None and path not in (suffix, suffix.rpartition(".")[0]):
            raise StageError(f"{where}.{suffix} is no label: it is no object with `{path}`; {hint}")
        self._check_kind(value, sample.key)
        if isinstance(value, str) and SEVERAL.fullmatch(value):
            raise StageError(
                f"{where}.{suffix}: the label {value[:60]!r} is more than one; an image has one class; {hint}"
            )
        if isinstance(value, str) and self._fields.class_names is not None:
            return text_label(value.encode("utf-8", "surrogatepass"), self._fields.class_names, where, hint)
        return label_of(value, self._fields.class_names, f"{where}.{suffix}", hint)

    def _label_file(self, sample: _Sample, where: str) -> str | None:
        """The suffix of the file that tells the class: LABELS, and where there is none of them, one with a field."""
        wanted = self._fields.label
        for suffix in sample.labels if wanted is not None else ():
            if wanted in (suffix, suffix.rpartition(".")[0]):
                return suffix
        for kind in LABELS if wanted is None else ("json",):
            if kind in sample.labels:
                return kind
        # A .txt with a field is rather a caption.
        for kind in ("cls", "json") if wanted is None else ("json",):
            found = [suffix for suffix in sample.labels if suffix.rpartition(".")[2] == kind]
            if len(found) > 1:
                raise StageError(f"{where} has the labels {', '.join(found[:5])}; choose one: ?label={found[0]}")
            if found:
                return found[0]
        return None

    def _json(self, data: bytes, where: str) -> Any:
        try:
            return json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise StageError(f"{where} is no label: it is no JSON ({error})") from error

    def _check_kind(self, value: Any, key: str) -> None:
        """Raises StageError where some labels are numbers without names, and others names: one of them is wrong."""
        kind = {str: str, int: int, float: int}.get(type(value))
        if kind is None or value in ("", -1) or value != value or self._fields.class_names is not None:
            return
        self._json_kinds.setdefault(kind, key)
        if len(self._json_kinds) == 2:
            raise StageError(
                f"{self._shard.location}: the label of {self._json_kinds[int]} is a number, and that of "
                f"{self._json_kinds[str]} a name. ?class_names=FILE tells the names of numbers; else mend the labels"
            )

    def _no_label(self, why: str, kind: str) -> Label:
        return Label("", noted=self._without.setdefault(kind, f"unlabelled: {why}"))


def webdataset_shards(shards: dict[str, Location], where: str, fields: Fields) -> Listed:
    """Shards by their path below what they have in common, each a part.

    Args:
        shards: path, without the suffix -> the shard.
        where: for messages.
        fields: which image and label of a sample are read; class names are of the numbers in labels.

    Raises:
        StageError: some names tell a split and others do not.
    """
    splits = splits_of(shards, where)
    if fields.class_names is not None:
        fields = fields._replace(class_names=apart(fields.class_names))
    parts: list[Part] = [
        WebdatasetShard(location, splits[below], below, stamp_of([location.entry()]), fields)
        for below, location in sorted(shards.items())
    ]
    return Listed("webdataset shards", parts)


def _is_image(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in SOURCE_SUFFIXES


def _key(path: list[str]) -> tuple[str, str]:
    """A sample's key, and the suffix in lower case: the base name is parted at its first dot."""
    base, _, suffix = path[-1].partition(".")
    return "/".join([*path[:-1], base]), suffix.lower()
