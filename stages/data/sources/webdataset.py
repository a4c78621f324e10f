"""Webdataset shards: tars in which the files of one sample follow each other, `0001.jpg 0001.cls`."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from stages.data.raw.images import SOURCE_SUFFIXES
from stages.data.sources.locations import Location
from stages.data.sources.parts import (
    Image,
    LeftOut,
    Listed,
    Name,
    Noted,
    Part,
    ShardPart,
    Unique,
    check_class,
    splits_of,
    stamp_of,
)
from stages.data.sources.tars import Member, members, opened
from stages.runtime.command import StageError

LARGEST_HELD = 2**28
"""Bytes of an image. Its label may follow it in the tar, and until then it is held in memory."""
LARGEST_LABEL = 2**20
LABELS = ("cls", "json", "txt")
"""Which file tells the class: the first of these that the sample has."""


@dataclass
class _Sample:
    """The files of one sample that have come so far."""

    key: str
    image: str = ""
    data: bytes = b""
    labels: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class WebdatasetShard(ShardPart):
    """Samples become `<shard>/<key>.<suffix>`."""

    class_names: tuple[str, ...] | None
    labelled: bool

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """A sample after the other.

        Raises:
            StageError: the shard is damaged or holds what is refused; a sample has two images, or an odd label.
        """
        yield from self._samples(with_bytes=True)

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        for item in self._samples(with_bytes=False):
            yield Name(item.split, item.class_name, item.name, item.title) if isinstance(item, Image) else item

    def _samples(self, with_bytes: bool) -> Iterator[Image | LeftOut | Noted]:
        unique = Unique(str(self.location))
        sample: _Sample | None = None
        with opened(self.location) as tar:
            for member in members(tar, str(self.location)):
                key, suffix = _key(member.path)
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield self._whole(sample)
                    unique.check(key)
                    sample = _Sample(key)
                self._take(sample, suffix, member, with_bytes)
            if sample is not None:
                yield self._whole(sample)

    def _take(self, sample: _Sample, suffix: str, member: Member, with_bytes: bool) -> None:
        where = f"{self.location}: {'/'.join(member.path)}"
        if f".{suffix}" in SOURCE_SUFFIXES:
            if sample.image:
                raise StageError(f"{where} is the second image of its sample; a sample has one image and one label")
            if member.size > LARGEST_HELD:
                raise StageError(f"{where} has {member.size / 2**20:.0f} MiB, and an image of a shard may have 256")
            sample.image, sample.data = suffix, member.data.read() if with_bytes else b""
        elif suffix in LABELS and self.labelled:
            if member.size > LARGEST_LABEL:
                raise StageError(f"{where} has {member.size} bytes, too many for a label")
            sample.labels[suffix] = member.data.read()

    def _whole(self, sample: _Sample) -> Image | LeftOut:
        if not sample.image:
            return LeftOut(f"{self.below}/{sample.key}", "sample without an image")
        name = f"{self.below}/{sample.key}.{sample.image}"
        class_name = self._class_name(sample)
        return Image(self.split, class_name, name, len(sample.data), io.BytesIO(sample.data))

    def _class_name(self, sample: _Sample) -> str:
        where = f"{self.location}: {sample.key}"
        kind = next((kind for kind in LABELS if kind in sample.labels), None)
        if kind is None:
            return ""
        try:
            text = sample.labels[kind].decode("utf-8").strip()
            label = str(json.loads(text).get("label", "")) if kind == "json" else text
        except (ValueError, AttributeError, RecursionError) as error:
            raise StageError(f"{where}.{kind} is no label ({error})") from error
        if kind == "json" and label == "":
            return ""
        if self.class_names is None or not re.fullmatch(r"-?\d+", label, re.ASCII):
            return "" if label == "-1" else check_class(label, f"{where}.{kind}")
        number = int(label) if len(label) < 20 else len(self.class_names)
        if not -1 <= number < len(self.class_names):
            raise StageError(f"{where}.{kind}: {number} is none of the {len(self.class_names)} class names")
        return "" if number == -1 else check_class(self.class_names[number], f"{where}.{kind}")


def webdataset_shards(
    shards: dict[str, Location], where: str, class_names: tuple[str, ...] | None, labelled: bool
) -> Listed:
    """Shards by their path below what they have in common, each a part.

    Args:
        shards: path, without the suffix -> the shard.
        where: for messages.
        class_names: of the numbers in labels; None: a number is the name.
        labelled: whether labels are read.

    Raises:
        StageError: some names tell a split and others do not.
    """
    splits = splits_of(shards, where)
    parts: list[Part] = [
        WebdatasetShard(location, splits[below], below, stamp_of([location.entry()]), class_names, labelled)
        for below, location in sorted(shards.items())
    ]
    return Listed("webdataset shards", parts)


def _key(path: list[str]) -> tuple[str, str]:
    """A sample's key, and the suffix in lower case: the base name is parted at its first dot."""
    base, _, suffix = path[-1].partition(".")
    return "/".join([*path[:-1], base]), suffix.lower()
