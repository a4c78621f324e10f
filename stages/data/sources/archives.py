"""Archives of class folders: `imagenette2.tgz`, `.tar.gz` or `.tar`, read in one pass without unpacking."""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.data.raw.images import SOURCE_SUFFIXES
from stages.data.sources.locations import Location
from stages.data.sources.parts import SPLITS, Image, LeftOut, Listed, Name, Noted, Part, Unique, check_class, stamp_of
from stages.data.sources.tars import decompressed, members, opened
from stages.runtime.command import StageError

OUTSIDE = "file outside of the class folders"


@dataclass(frozen=True)
class Layout:
    """Where in a member's name split and class stand: `top` folders come first, then the split where `has_splits`."""

    top: str | None
    has_splits: bool

    @property
    def depth(self) -> int:
        """How many folders an image lies in."""
        return (self.top is not None) + self.has_splits + 1


@dataclass(frozen=True)
class Archive(Part):
    """One archive of class folders, with or without splits, with or without one folder around all."""

    location: Location
    stamp: str
    checksum: tuple[str, str] | None = None
    """Algorithm and expected value, in hex."""

    @property
    def title(self) -> str:
        return self.location.name

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """Every file that lies in a class, in the archive's order.

        Raises:
            StageError: the archive is damaged, holds what is refused, or has another layout.
        """
        where, unique = str(self.location), Unique(str(self.location))
        layout = layout_of(self.location)
        with opened(self.location, self.checksum) as tar:
            for member in members(tar, where):
                if (found := _name_of(member.path, layout, where)) is None:
                    yield LeftOut("/".join(member.path), OUTSIDE)
                    continue
                unique.check(found.split, found.class_name, found.name)
                yield Image(found.split, found.class_name, found.name, member.size, member.data)

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        """The same without the bytes; of a compressed archive, all of it is read."""
        layout = layout_of(self.location)
        with opened(self.location, self.checksum) as tar:
            for member in members(tar, str(self.location)):
                yield _name_of(member.path, layout, str(self.location)) or LeftOut("/".join(member.path), OUTSIDE)


def first_image(location: Location) -> list[str]:
    """The parts of the name of the first image, by its suffix, in an archive; read from its beginning.

    Raises:
        StageError: it is no archive, or has no image.
    """
    with location.open() as raw:
        for member in members(decompressed(raw, str(location)), str(location)):
            if member.path[-1].lower().endswith(SOURCE_SUFFIXES):
                return member.path
    raise StageError(f"{location} holds no image (by their suffixes: {', '.join(SOURCE_SUFFIXES)})")


def archive(location: Location, checksum: tuple[str, str] | None) -> Listed:
    """One archive of class folders as a source."""
    layout = layout_of(location)
    words = "split folders with class folders" if layout.has_splits else "class folders"
    inside = f" in {layout.top}/" if layout.top else ""
    return Listed(f"archive of {words}{inside}", [Archive(location, stamp_of([location.entry()]), checksum)])


def layout_of(location: Location) -> Layout:
    """What the first image's name tells: `top/train/CLASS/*`, `train/CLASS/*`, `top/CLASS/*` or `CLASS/*`.

    Raises:
        StageError: the first image lies in no class folder, or the layout is one that is read unpacked.
    """
    path = first_image(location)
    if "CLS-LOC" in path or path[-2:-1] == ["images"]:
        raise StageError(f"{location} is Kaggle's or Tiny ImageNet's archive; unpack it, and name the folder")
    if len(path) > 2 and path[0] in SPLITS:
        return Layout(None, True)
    if len(path) > 3 and path[1] in SPLITS:
        return Layout(path[0], True)
    if len(path) == 2:
        return Layout(None, False)
    if len(path) > 2:
        return Layout(path[0], False)
    raise StageError(f"{location}: {'/'.join(path)} lies in no class folder (expected CLASS/*, or train/CLASS/*)")


def _name_of(path: list[str], layout: Layout, where: str) -> Name | None:
    """Split, class and name of a member; None for a file that lies in no class folder.

    Raises:
        StageError: it lies elsewhere than the first image told.
    """
    if len(path) <= layout.depth:
        return None
    rest = path[layout.top is not None :]
    split = rest[0] if layout.has_splits else "all"
    if path[0] != layout.top is not None or split not in (*SPLITS, "all"):
        raise StageError(
            f"{where} mixes layouts: {'/'.join(path)} does not lie as its first image does; expected one folder of "
            f"train/ val/ test/, or of classes"
        )
    class_name, *names = rest[layout.has_splits :]
    return Name(split, check_class(class_name, where), "/".join(names))
