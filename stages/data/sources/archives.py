"""Archives of class folders: `.tgz`, `.tar.gz`, `.tar.bz2`, `.tar` or `.zip`, read without unpacking.

A first pass reads the names of all members, which decide what is a split and what a class; of these only counts per
folder are kept. The second pass reads the images.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from stages.data.raw.images import SOURCE_SUFFIXES
from stages.data.sources.layouts import (
    DEEPEST,
    JUNK,
    Inside,
    Layout,
    Options,
    Path,
    is_image,
    may_be_image,
    no_labels,
    understand,
    unlabelled_splits,
)
from stages.data.sources.locations import Hidden, Location
from stages.data.sources.parts import (
    Image,
    LeftOut,
    Listed,
    Name,
    Noted,
    Part,
    Unique,
    hidden_files,
    splits_of,
    stamp_of,
)
from stages.data.sources.tars import Checked, Member, Readable, compare, members, opened
from stages.data.sources.uri import SourceUri
from stages.data.sources.zips import zip_members
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)
MOST_FOLDERS = 500_000
ZIP = ".zip"
GoOn = Callable[[], bool]


class ArchiveNames:
    """Counts of files in each folder of an archive: all that its layout is told by."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.has_classes_beside = False
        """Files `.cls`, which only webdataset has."""
        self.is_whole = True
        self._counts: dict[Path, list[int]] = {(): [0, 0, 0]}
        self._examples: dict[Path, str] = {}
        self._below: dict[Path, dict[str, Inside]] = {}

    @property
    def images(self) -> int:
        """What may be images, in all folders."""
        return sum(each[0] for each in self._counts.values())

    def add(self, path: list[str]) -> None:
        """One file.

        Raises:
            StageError: there are more folders than any set of images has.
        """
        folder, name = tuple(path[:-1][: DEEPEST + 2]), path[-1]
        if not JUNK.isdisjoint(folder):
            return
        if (counts := self._counts.get(folder)) is None:
            counts = self._counts[folder] = [0, 0, 0]
            if len(self._counts) > MOST_FOLDERS:
                raise StageError(f"{self.where} has more than {MOST_FOLDERS} folders; is it a set of images?")
        fits = may_be_image(name)
        counts[0] += fits
        counts[1] += not fits
        counts[2] += is_image(name)
        self.has_classes_beside |= name.endswith(".cls")
        self._examples.setdefault(folder, name)

    def end(self) -> None:
        """All names are in: makes every folder above one known, and what is below each."""
        for folder, (images, others, _) in sorted(self._counts.items()):
            for depth in range(len(folder)):
                known = self._below.setdefault(folder[:depth], {})
                each = known.get(folder[depth], Inside())
                known[folder[depth]] = each._replace(images=each.images + images, others=each.others + others)

    def all_folders(self) -> Iterable[Path]:
        """Every folder that holds files."""
        return self._counts

    def folders(self, path: Path) -> list[str]:
        return sorted(self._below.get(path, ()))

    def direct(self, path: Path) -> Inside:
        images, others, surely = self._counts.get(path, (0, 0, 0))
        return Inside(images, others, surely=surely, example=self._examples.get(path, ""))

    def inside(self, paths: Sequence[Path]) -> list[Inside]:
        found = []
        for path in paths:
            below = self._below.get(path, {})
            images = {name: each.images for name, each in below.items() if each.images}
            others = sum(each.others for each in below.values())
            found.append(self.direct(path)._replace(below=images, others_below=others))
        return found


@dataclass(frozen=True)
class Archive(Part):
    """One archive of class folders, laid out as a first pass over its names told."""

    location: Location
    stamp: str
    layout: Layout
    checksum: tuple[str, str] | None = None
    """Algorithm and expected value, in hex."""
    below: str = ""
    """Its own name, where it is one of several."""
    prefix: str = ""
    """Of the names of its images."""

    @property
    def title(self) -> str:
        return self.below or self.location.name

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """Every file that lies in a class, in the archive's order.

        Raises:
            StageError: the archive is damaged, or holds what is refused.
        """
        unique, hidden = Unique(str(self.location)), Hidden()
        for member in _members(self.location, hidden, self.checksum):
            if isinstance(found := self._placed(member), LeftOut):
                yield found
            else:
                unique.check(found.split, found.class_name, found.name)
                yield Image(found.split, found.class_name, found.name, member.size, member.data)
        yield from hidden_files(hidden)

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        """The same without the bytes; of a compressed tar, all of it is read."""
        hidden = Hidden()
        for member in _members(self.location, hidden):
            yield self._placed(member)
        yield from hidden_files(hidden)

    def _placed(self, member: Member) -> Name | LeftOut:
        found = self.layout.place(member.path, str(self.location))
        return found._replace(name=f"{self.prefix}{found.name}")


def archive_names(location: Location, go_on: GoOn | None = None, most: int | None = None) -> ArchiveNames:
    """Reads the names in an archive: of a zip its directory, of a tar every header, of a compressed one everything.

    Args:
        location: of the archive.
        go_on: asked after each name; where it says no, the names so far are all.
        most: so many names are enough.

    Raises:
        StageError: it is no archive, is damaged or holds what is refused, or has no image.
    """
    names = ArchiveNames(str(location))
    if not is_zip(location) and not location.address.partition("?")[0].lower().endswith(".tar"):
        logger.info(
            "%s is compressed, so it is read twice, the first time for the names of all that is in it", location
        )
    for count, member in enumerate(_members(location), start=1):
        names.add(member.path)
        if count == most or (go_on is not None and not go_on()):
            names.is_whole = False
            break
    names.end()
    if not names.images and names.is_whole:
        raise StageError(f"{location} holds no image (by their suffixes: {', '.join(SOURCE_SUFFIXES)}, ...)")
    return names


def is_webdataset(names: ArchiveNames) -> bool:
    """Whether a tar is a shard rather than an archive of class folders: most of its images lie in no folder."""
    return names.has_classes_beside or 2 * names.direct(()).images >= names.images


def is_zip(location: Location) -> bool:
    """By its suffix."""
    return location.address.partition("?")[0].lower().endswith(ZIP)


def archives(found: dict[str, ArchiveNames], at: dict[str, Location], options: Options, uri: SourceUri) -> Listed:
    """Archives of class folders as a source; of several, the names tell the splits.

    Args:
        found: path below the folder of all, without suffix -> its names.
        at: the same path -> where it is.
        options: of the query.
        uri: for messages, and the checksum of a lone one.

    Raises:
        StageError: a layout can be read in two ways, or they do not fit together.
    """
    if samples := sorted(below for below, names in found.items() if names.has_classes_beside and is_zip(at[below])):
        raise StageError(f"source {uri.text}: {samples[0]} is a zip of webdataset samples (with .cls); make it a tar")
    layouts = {below: _understood(names, options) for below, names in sorted(found.items())}
    notes = list(dict.fromkeys(note for layout in layouts.values() for note in layout.notes))
    if not all(names.is_whole for names in found.values()):
        notes.append("only the first names were read; ingest reads all before it decides")
    if len(layouts) == 1:
        (below, layout), checksum = next(iter(layouts.items())), uri.checksum()
        part = Archive(at[below], stamp_of([at[below].entry()]), layout, checksum)
        return Listed(f"archive of {layout.words}", [part], tuple(notes))
    _together(layouts, options, uri.text)
    splits = [root.split for layout in layouts.values() for root in layout.roots]
    is_apart = len(set(splits)) == len(splits)  # else names of several archives may be the same
    parts = [
        Archive(at[below], stamp_of([at[below].entry()]), each, None, below, "" if is_apart else f"{below}/")
        for below, each in layouts.items()
    ]
    return Listed(f"{len(parts)} archives of {next(iter(layouts.values())).words}", list(parts), tuple(notes))


def _together(layouts: dict[str, Layout], options: Options, uri: str) -> None:
    """Gives each of several archives the split that its name tells.

    Raises:
        StageError: they do not fit together.
    """
    flat = [below for below, layout in layouts.items() if all(root.is_flat for root in layout.roots)]
    if flat and options.unlabelled == "false":
        raise StageError(
            f"source {uri}: {flat[0]} is one of {len(layouts)} archives, and its images lie in no class folder. If "
            f"each archive is a class, unpack each into a folder; else name one archive, or take all without labels "
            f"with ?unlabelled=true"
        )
    for below, split in splits_of(layouts, uri).items():
        layout = layouts[below]
        if layout.has_splits and split != "all":
            raise StageError(f"source {uri}: {below} is {split} by its name, and has splits inside; name one archive")
        if split != "all":
            layout.roots = [root._replace(split=split) for root in layout.roots]


def _understood(names: ArchiveNames, options: Options) -> Layout:
    if "CLS-LOC" in {name for path in names.all_folders() for name in path[:4]}:
        raise StageError(f"{names.where} is Kaggle's archive of ImageNet; unpack it, and name the folder")
    layout = understand(names, options)
    for root in unlabelled_splits(layout):
        images = names.inside([root.path])[0].all_images
        raise no_labels(
            names.where,
            root,
            images,
            "Unpack it and name the folder: a table of labels in it, beside the images, is then read.",
        )
    return layout


def _members(
    location: Location, hidden: Hidden | None = None, checksum: tuple[str, str] | None = None
) -> Iterator[Member]:
    """The files of a tar or zip; the checksum is compared after the last one."""
    where = str(location)
    if not is_zip(location):
        with opened(location, checksum) as tar:
            yield from members(tar, where, hidden=hidden)
        return
    with location.open(random_access=True) as directory, location.open(random_access=True) as data:
        yield from zip_members(directory, data, where, hidden)
    if checksum:
        with location.open() as file:
            compare(location, checksum, Checked(cast(Readable, file), checksum[0]))
