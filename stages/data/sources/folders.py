"""Folders of images: classes, with or without splits; the layouts of Tiny ImageNet and Kaggle; images alone."""

import csv
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

from stages.data.raw.images import SOURCE_SUFFIXES
from stages.data.sources.locations import Entry, Location, check_size
from stages.data.sources.parts import (
    SPLITS,
    Image,
    LeftOut,
    Listed,
    Name,
    Noted,
    Part,
    check_class,
    stamp_of,
)
from stages.runtime.command import StageError

PIECE = 20_000
"""Files. A larger class is read in pieces, so that no single one keeps the others waiting at the end."""
LISTED_AT_ONCE = 16
"""Folders: a store far away answers one after the other slowly, and several at once as fast as one."""
LABELS = "LOC_val_solution.csv"


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
            with self.folder.child(entry.name).open_listed(entry.size) as data:
                size = entry.size
                if size < 0:  # a listing of a web server
                    size = data.seek(0, os.SEEK_END)
                    data.seek(0)
                    check_size(f"{self.folder}/{entry.name}", size)
                yield Image(self.split, self.class_name, entry.name, size, data)

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        for entry in self._entries():
            yield Name(self.split, self.class_name, entry.name)

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


def image_folder(folder: Location) -> Listed:
    """`train/CLASS/*` with `val/` and `test/` where there are any, or one level of classes.

    Raises:
        StageError: split folders lie beside others, or a class has no file.
    """
    children = _folders(folder)
    layout = "class folders"
    if "train" in children and set(children) <= set(SPLITS):
        layout = "split folders with class folders"
        classes = [
            _Class(split, name, folder.child(f"{split}/{name}"))
            for split in children
            for name in _folders(folder.child(split))
        ]
    elif any(_folders(folder.child(name)) for name in children if name in SPLITS):
        others = ", ".join(sorted(set(children) - set(SPLITS))) or "no `train`"
        raise StageError(f"{folder} mixes split folders with others ({others}); expected train/ val/ test/, or classes")
    else:
        classes = [_Class("all", name, folder.child(name)) for name in children]
    return Listed(layout, _listed(classes))


def tiny_imagenet(folder: Location) -> Listed:
    """Tiny ImageNet's own layout: images of train in a folder a class, those of val in one, with a table of labels.

    Raises:
        StageError: files of the layout are missing, or the table is wrong.
    """
    table = folder.child("val/val_annotations.txt")
    if not table.is_file() or not folder.child("train").is_folder():
        raise StageError(f"{folder} has wnids.txt, but not Tiny ImageNet's train/ and val/val_annotations.txt")
    labels = {}
    for number, line in enumerate(table.lines(), start=1):
        name, tab, rest = line.partition("\t")
        class_name = rest.split("\t")[0]
        if not tab or not class_name:
            raise StageError(f"{table}, line {number}: expected a file name, a tab and a wnid, found {line!r}")
        if name in labels:
            raise StageError(f"{table}, line {number}: {name} is in it twice")
        labels[name] = class_name
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


def kaggle_labels(table: Location) -> dict[str, str]:
    """File name -> wnid, of a LOC_val_solution.csv.

    Raises:
        StageError: it is something else.
    """
    rows = csv.reader(table.lines())
    if (head := next(rows, [])) != ["ImageId", "PredictionString"]:
        raise StageError(f"{table}: expected the columns ImageId,PredictionString, found {','.join(head)[:200]!r}")
    labels = {}
    for row in rows:
        words = row[1].split() if len(row) == 2 else []
        if not words or f"{row[0]}.JPEG" in labels:
            raise StageError(f"{table}, line {rows.line_num}: expected a new ImageId and a wnid, found {row!r}")
        labels[f"{row[0]}.JPEG"] = check_class(words[0], f"{table}, line {rows.line_num}")
    return labels


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
