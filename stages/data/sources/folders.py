"""Folders of images: classes, with or without splits; the layouts of Tiny ImageNet and Kaggle; images alone."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple

from stages.data.raw.images import SOURCE_SUFFIXES
from stages.data.sources.label_tables import DEVKIT, LABELS, annotations, kaggle_labels, labels_beside, tables_in
from stages.data.sources.layouts import (
    ABOVE,
    OUTSIDE,
    SYSTEM,
    Inside,
    Layout,
    Options,
    Path,
    Root,
    count_inside,
    is_image,
    is_junk,
    may_be_image,
    no_labels,
    some,
    understand,
    unlabelled_splits,
)
from stages.data.sources.locations import Entry, Hidden, Location, check_size
from stages.data.sources.parts import (
    Image,
    LeftOut,
    Listed,
    Name,
    Noted,
    Part,
    check_class,
    hidden_files,
    stamp_of,
)
from stages.runtime.command import StageError

PIECE = 20_000
"""Files. A larger class is read in pieces, so that no single one keeps the others waiting at the end."""
LISTED_AT_ONCE = 16
"""Folders: a store far away answers one after the other slowly, and several at once as fast as one."""


@dataclass(frozen=True)
class ClassFiles(Part):
    """A class of one split in a folder; with `chosen`, these files of it alone, in this order."""

    split: str
    class_name: str  # empty: unlabelled
    folder: Location
    stamp: str
    chosen: tuple[Entry, ...] | None = None
    piece: int | None = None
    file_count: int | None = None

    @property
    def title(self) -> str:
        return f"{self.split}/{self.class_name}" + (f" ({self.piece})" if self.piece is not None else "")

    @property
    def whole_class(self) -> tuple[str, str] | None:
        return (self.split, self.class_name) if self.class_name and self.piece is None else None

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """Every file, sorted by name.

        Raises:
            StageError: one cannot be read, or the folder is no longer as it was listed.
        """
        for entry in self._entries():
            if is_junk(entry.name):
                yield LeftOut(f"{self.split}/{self.class_name}/{entry.name}", SYSTEM)
                continue
            with self.folder.child(entry.name).open_listed(entry.size) as data:
                size = entry.size
                if size < 0:  # a listing of a web server
                    size = data.seek(0, os.SEEK_END)
                    data.seek(0)
                    check_size(f"{self.folder}/{entry.name}", size)
                yield Image(self.split, self.class_name, entry.name, size, data)

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        for entry in self._entries():
            is_left_out = is_junk(entry.name)
            shown = f"{self.split}/{self.class_name}/{entry.name}"
            yield LeftOut(shown, SYSTEM) if is_left_out else Name(self.split, self.class_name, entry.name)

    def _entries(self) -> Iterable[Entry]:
        if self.chosen is not None:
            return self.chosen
        entries = self.folder.files_below()
        if stamp_of(entries) != self.stamp:
            raise StageError(f"{self.folder} is being changed while it is read; run again when nothing writes to it")
        return entries


class _Class(NamedTuple):
    """A folder that is all of one class."""

    split: str
    class_name: str
    folder: Location


@dataclass
class _Listing:
    """A class folder as it was listed; its files only where they are many."""

    inside: Inside
    stamp: str
    files: int
    entries: list[Entry] | None


class FolderTree:
    """The folders of a source, listed as far as its layout asks."""

    def __init__(self, folder: Location) -> None:
        self.where, self._folder, self.hidden = str(folder), folder, Hidden()
        self._entries: dict[Path, list[Entry]] = {}
        self._lock = Lock()
        self.listings: dict[Path, _Listing] = {}

    def at(self, path: Path) -> Location:
        """Where a folder is."""
        return self._folder.child("/".join(path))

    def entries(self, path: Path) -> list[Entry]:
        """What a folder holds."""
        if path not in self._entries:
            self._entries[path] = self.at(path).entries(self.hidden)
        return self._entries[path]

    def folders(self, path: Path) -> list[str]:
        return [entry.name for entry in self.entries(path) if entry.is_folder]

    def direct(self, path: Path) -> Inside:
        return count_inside(entry.name for entry in self.entries(path) if not entry.is_folder)

    def inside(self, paths: Sequence[Path]) -> list[Inside]:
        new = [path for path in paths if path not in self.listings]
        with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
            self.listings |= dict(zip(new, pool.map(self._listing, new), strict=True))
        return [self.listings[path].inside for path in paths]

    def _listing(self, path: Path) -> _Listing:
        hidden = Hidden()
        found = self.at(path).files_below(hidden)
        with self._lock:
            self.hidden.files += hidden.files
            self.hidden.name = min(
                filter(None, (self.hidden.name, "/".join((*path, hidden.name)) if hidden.name else "")), default=""
            )
        inside = count_inside(entry.name for entry in found)
        return _Listing(inside, stamp_of(found), len(found), found if len(found) > PIECE else None)


def image_folder(folder: Location, options: Options) -> Listed:
    """Class folders, in split folders or not, below any number of folders around all (layouts.py).

    Raises:
        StageError: there are none, the folders can be read in more than one way, a split has no labels, or a class has
            no file.
    """
    tree = FolderTree(folder)
    layout = understand(tree, options)
    parts: list[Part] = []
    left_out: list[LeftOut] = []
    bare = unlabelled_splits(layout)
    for root in layout.roots:
        if root in bare:
            of_split, without = _from_table(tree, layout, root)
            parts += of_split
            left_out += without
        elif root.is_flat:
            entries = tree.at(root.path).files_below()
            if not any(is_image(entry.name.rpartition("/")[2]) for entry in entries):
                raise StageError(f"{tree.at(root.path)} holds no class folder (expected CLASS/*, or train/CLASS/*)")
            parts += _pieces(ClassFiles(root.split, "", tree.at(root.path), ""), entries)
        else:
            parts += _classes(tree, layout, root)
    left_out += [*_outside(tree, layout), *hidden_files(tree.hidden)]
    return Listed(layout.words, parts, tuple(layout.notes), tuple(left_out))


def _classes(tree: FolderTree, layout: Layout, root: Root) -> Iterator[Part]:
    """The classes of a root, in the order of their names."""
    paths = [path for path in layout.classes if path[: len(root.path)] == root.path]
    if layout.unlabelled and (above := _direct_images(tree, root.path)):
        yield from _pieces(ClassFiles(root.split, "", tree.at(root.path), ""), above)
    if layout.level > 1:
        yield from _deep_classes(tree, layout, root, paths)
        return
    for path in paths:
        listing = tree.listings[path]
        name = check_class(path[-1], str(tree.at(path)))
        whole = ClassFiles(root.split, name, tree.at(path), listing.stamp, file_count=listing.files)
        yield from [whole] if listing.entries is None else _pieces(whole, listing.entries)


def _deep_classes(tree: FolderTree, layout: Layout, root: Root, paths: list[Path]) -> Iterator[Part]:
    """Classes some levels down: folders of one name are one class, and the folders above are part of a file's name."""
    classes: dict[str, list[Path]] = {}
    for path in paths:
        classes.setdefault(layout.class_of(root, path), []).append(path)
    for name, of in sorted(classes.items()):
        entries = []
        for path in of:
            above = "/".join(path[len(root.path) :])
            entries += [entry._replace(name=f"{above}/{entry.name}") for entry in tree.at(path).files_below()]
        yield from _pieces(ClassFiles(root.split, check_class(name, tree.where), tree.at(root.path), ""), entries)


def _direct_images(tree: FolderTree, path: Path) -> list[Entry]:
    """Images in a folder itself, with their sizes."""
    names = [entry.name for entry in tree.entries(path) if not entry.is_folder and is_image(entry.name)]
    return [tree.at(path).child(name).entry()._replace(name=name) for name in names]


def _from_table(tree: FolderTree, layout: Layout, root: Root) -> tuple[list[Part], list[LeftOut]]:
    """The images of a split without class folders, labelled by a table beside them; and what it does not name.

    Raises:
        StageError: there is no such table.
    """
    folder, shown = tree.at(root.path), "/".join(root.path)
    entries = {entry.name: entry for entry in folder.files_below() if may_be_image(entry.name.rpartition("/")[2])}
    places = [tree.at(root.path[:depth]) for depth in range(len(root.path), -1, -1)]
    classes = {path[-1] for path in layout.classes}
    found = labels_beside(places, {name.rpartition("/")[2] for name in entries}, classes)
    if found is None:
        tables = tables_in(places)
        beside = f" ({some(tables)} beside it names other files or other classes)" if tables else ""
        hint = f"Put a table of labels beside it, as {LABELS}, {DEVKIT}, or a CSV of file names and classes{beside}."
        raise no_labels(tree.where, root, len(entries), hint)
    labels, table = found
    layout.notes.append(f"{shown}/ has no class folders; its labels are from {table.name}")
    of: dict[str, list[Entry]] = {}
    left_out = []
    for name, entry in entries.items():
        class_name = labels.get(name.rpartition("/")[2])
        if class_name in classes:
            of.setdefault(class_name, []).append(entry)
        else:
            left_out.append(LeftOut(f"{shown}/{name}", NOT_NAMED if class_name is None else NO_CLASS))
    parts: list[Part] = [
        ClassFiles(root.split, check_class(name, str(table)), folder, stamp_of(files), _without_stamps(files))
        for name, files in sorted(of.items())
    ]
    return parts, left_out


NOT_NAMED = "image that the table of labels does not name"
NO_CLASS = "image whose label in the table is no class of train"


def _outside(tree: FolderTree, layout: Layout) -> Iterator[LeftOut]:
    """Folders that are not read, and files above the class folders."""
    for path, why in sorted(layout.dropped.items()):
        if files := tree.at(path).files_below():
            yield LeftOut(f"{'/'.join(path)}/{files[0].name}", why, len(files))
    above = {root.path[:depth] for root in layout.roots for depth in range(len(root.path))}
    inner = {path[:depth] for path in layout.classes for depth in range(len(path))}
    for path in sorted(above | inner):
        if layout.unlabelled and path in {root.path for root in layout.roots}:
            continue
        names = [entry.name for entry in tree.entries(path) if not entry.is_folder]
        for why, fits in ((ABOVE, True), (OUTSIDE, False)):
            if these := [name for name in names if is_image(name) == fits]:
                yield LeftOut("/".join((*path, these[0])), why, len(these))


def tiny_imagenet(folder: Location) -> Listed:
    """Tiny ImageNet's own layout: images of train in a folder a class, those of val in one, with a table of labels.

    Raises:
        StageError: files of the layout are missing, or the table is wrong.
    """
    table = folder.child("val/val_annotations.txt")
    if not table.is_file() or not folder.child("train").is_folder():
        raise StageError(f"{folder} has wnids.txt, but not Tiny ImageNet's train/ and val/val_annotations.txt")
    labels = annotations(table)
    train = folder.child("train")
    classes = [_Class("train", name, train.child(f"{name}/images")) for name in _folders(train)]
    val, left_out = _labelled("val", folder.child("val/images"), labels, table)
    return Listed("Tiny ImageNet's folders", _listed(classes) + val, left_out=left_out)


def kaggle(folder: Location) -> Listed:
    """`ILSVRC/Data/CLS-LOC` as Kaggle's archive unpacks; `folder` holds ILSVRC, or is it.

    Raises:
        StageError: there is no train, no table of labels for val, or the table is wrong.
    """
    images = next((found for found in map(folder.child, KAGGLE) if found.is_folder()), folder)
    tables = [folder.child(LABELS), folder.child(f"ILSVRC/{LABELS}"), folder.parent().child(LABELS)]
    train = images.child("train")
    if not train.is_folder():
        raise StageError(f"{images} has no train/; unpack all of Kaggle's archive")
    parts = _listed([_Class("train", name, train.child(name)) for name in _folders(train)])
    left_out: tuple[LeftOut, ...] = ()
    if images.child("val").is_folder():
        table = next((table for table in tables if table.is_file()), None)
        if table is None:
            raise StageError(f"{images.child('val')} has no labels: put {LABELS} of the same download into {folder}")
        val, left_out = _labelled("val", images.child("val"), kaggle_labels(table), table)
        parts += val
    if images.child("test").is_folder():
        left_out += (LeftOut("test/", "folder of images whose labels were never published"),)
    return Listed("Kaggle's folders of ImageNet", parts, left_out=left_out)


KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")


def flat_folder(folder: Location, split: str = "all") -> Listed:
    """Images without classes, in one folder or below it.

    Raises:
        StageError: something cannot be read.
    """
    return Listed("images without classes", _pieces(ClassFiles(split, "", folder, ""), folder.files_below()))


def is_tiny_imagenet(_: Location, entries: list[Entry]) -> bool:
    """Whether a folder has Tiny ImageNet's list of classes."""
    return any(entry.name == "wnids.txt" for entry in entries)


def is_kaggle(folder: Location, entries: list[Entry]) -> bool:
    """Whether a folder holds Kaggle's layout, or is a folder of it."""
    known = any(entry.name == "ILSVRC" for entry in entries) or folder.name == "CLS-LOC"
    return known or any(folder.child(each).is_folder() for each in KAGGLE)


def is_flat(_: Location, entries: list[Entry]) -> bool:
    """Whether a folder holds images itself, and no folders."""
    files = [entry for entry in entries if not entry.is_folder]
    return len(files) == len(entries) and any(entry.name.lower().endswith(SOURCE_SUFFIXES) for entry in files)


def _folders(folder: Location) -> list[str]:
    return [entry.name for entry in folder.entries() if entry.is_folder]


def _listed(classes: list[_Class]) -> list[Part]:
    parts: list[Part] = []
    with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
        for found in pool.map(_class_parts, classes):
            parts += found
    return parts


def _class_parts(of: _Class) -> list[Part]:
    entries = of.folder.files_below() if of.folder.is_folder() else []
    if not entries:
        raise StageError(f"{of.folder}: the class folder {of.split}/{of.class_name} has no file; fill it or remove it")
    check_class(of.class_name, str(of.folder))
    whole = ClassFiles(of.split, of.class_name, of.folder, stamp_of(entries), file_count=len(entries))
    return [whole] if len(entries) <= PIECE else _pieces(whole, entries)


def _pieces(whole: ClassFiles, entries: list[Entry]) -> list[Part]:
    """A large class, or images without one, as parts that know their names: to list it again for each costs more."""
    cuts = [entries[start : start + PIECE] for start in range(0, len(entries), PIECE)]
    return [
        replace(whole, stamp=stamp_of(cut), chosen=_without_stamps(cut), piece=number, file_count=len(cut))
        for number, cut in enumerate(cuts)
    ]


def _labelled(
    split: str, folder: Location, labels: dict[str, str], table: Location
) -> tuple[list[Part], tuple[LeftOut, ...]]:
    """A folder of files of all classes, and the table that tells which: a part a class, and what it does not name."""
    entries = {entry.name: entry for entry in folder.files_below()} if folder.is_folder() else {}
    if missing := sorted(labels.keys() - entries.keys()):
        raise StageError(f"{table} names {missing[0]}, but {folder.child(missing[0])} is not there")
    others = sorted(entries.keys() - labels.keys())
    left_out = [LeftOut(f"{split}/{others[0]}", f"not named in {table.name}", len(others))] if others else []
    classes: dict[str, list[Entry]] = {}
    for name, class_name in sorted(labels.items()):
        classes.setdefault(class_name, []).append(entries[name])
    parts: list[Part] = [
        ClassFiles(split, check_class(name, str(table)), folder, stamp_of(found), _without_stamps(found))
        for name, found in sorted(classes.items())
    ]
    return parts, tuple(left_out)


def _without_stamps(entries: list[Entry]) -> tuple[Entry, ...]:
    return tuple(entry._replace(stamp="") for entry in entries)
