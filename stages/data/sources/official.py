"""The official ILSVRC2012 archives, as downloaded: a tar of class tars for train, a flat tar for val, labels beside."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from stages.data.sources.label_tables import DEVKIT, LABELS, devkit_labels, kaggle_labels
from stages.data.sources.locations import Entry, Hidden, Location
from stages.data.sources.parts import Image, LeftOut, Listed, Noted, Part, Unique, check_class, hidden_files, stamp_of
from stages.data.sources.tars import Readable, StreamSection, members, opened
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
LARGEST_CLASS = 2**36
"""Bytes of the tar of a class."""


@dataclass(frozen=True)
class ClassTar(Part):
    """A class tar inside the tar of train: `size` bytes from `offset` on."""

    location: Location
    class_name: str
    offset: int
    size: int
    stamp: str

    @property
    def title(self) -> str:
        return f"train/{self.class_name}"

    @property
    def whole_class(self) -> tuple[str, str] | None:
        return "train", self.class_name

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """Every file, in the tar's order.

        Raises:
            StageError: the tar is damaged, or holds what is refused.
        """
        where = f"{self.location}: {self.class_name}.tar"
        unique, hidden = Unique(where), Hidden()
        with self.location.open(random_access=True) as outer:
            section = StreamSection(cast(Readable, outer), self.offset, self.size)
            for member in members(section, where, hidden=hidden):
                name = "/".join(member.path)
                unique.check(name)
                yield Image("train", self.class_name, name, member.size, member.data)
        yield from hidden_files(hidden, f"{self.class_name}.tar/")


@dataclass(frozen=True)
class ValTar(Part):
    """The flat tar of val, with the label of each file."""

    location: Location
    labels: dict[str, str]
    stamp: str

    @property
    def title(self) -> str:
        return "val"

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """Every file, in the tar's order.

        Raises:
            StageError: the tar is damaged, holds what is refused, or a file that has no label.
        """
        unique, hidden = Unique(str(self.location)), Hidden()
        with opened(self.location) as tar:
            for member in members(tar, str(self.location), hidden=hidden):
                name = member.path[-1]
                if name not in self.labels:
                    raise StageError(f"{self.location}: {'/'.join(member.path)} has no label beside it")
                unique.check(name)
                yield Image("val", self.labels[name], name, member.size, member.data)
        yield from hidden_files(hidden)


def is_official(_: Location, entries: list[Entry]) -> bool:
    """Whether a folder holds one of the official archives."""
    return any(entry.name in (TRAIN, VAL) for entry in entries)


def official(folder: Location) -> Listed:
    """Train as a part a class, val as one, of the archives in one folder.

    Raises:
        StageError: an archive is damaged, or the labels of val are not there.
    """
    parts: list[Part] = []
    if (train := folder.child(TRAIN)).is_file():
        parts += _class_tars(train)
    if (val := folder.child(VAL)).is_file():
        labels, table = _val_labels(folder)
        parts.append(ValTar(val, labels, stamp_of([val.entry(), table.entry()])))
    return Listed("the official ILSVRC2012 archives", parts)


def _class_tars(train: Location) -> list[ClassTar]:
    stamp, unique = stamp_of([train.entry()]), Unique(str(train))
    found: list[ClassTar] = []
    with train.open(random_access=True) as file:
        for member in members(cast(Readable, file), str(train), LARGEST_CLASS):
            class_name = member.path[-1].removesuffix(".tar")
            if class_name == member.path[-1] or len(member.path) != 1:
                raise StageError(f"{train}: {'/'.join(member.path)} is no <wnid>.tar; is this the official archive?")
            unique.check(class_name)
            found.append(ClassTar(train, check_class(class_name, str(train)), member.offset, member.size, stamp))
    return sorted(found, key=lambda part: part.class_name)


def _val_labels(folder: Location) -> tuple[dict[str, str], Location]:
    devkit, table = folder.child(DEVKIT), folder.child(LABELS)
    if devkit.is_file():
        return devkit_labels(devkit), devkit
    if table.is_file():
        return kaggle_labels(table), table
    raise StageError(f"{folder.child(VAL)} has no labels: put {DEVKIT} or {LABELS} beside it")
