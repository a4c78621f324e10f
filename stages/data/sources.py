"""Sources: where images come from. Each is read as groups of files, one group a class of a split."""

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import parse_qsl

from stages.command import StageError

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SourceFile:
    """One file of a class as the source has it; `name` is relative to the class."""

    name: str
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Group:
    """The files of one class in one split of a source, sorted by name. A source without splits has the split `all`."""

    split: str
    class_name: str
    files: list[SourceFile]


@dataclass(frozen=True)
class Subset:
    """Which part of a source is taken. Choices are by hash of the name, so they do not depend on what else there is."""

    seed: int = 0
    classes: frozenset[str] | None = None
    num_classes: int | None = None
    images_per_class: int | None = None

    def chosen_classes(self, names: Iterable[str]) -> set[str]:
        """Of all class names of the source, the ones to take.

        Raises:
            StageError: a class that was asked for is not there.
        """
        available = set(names)
        wanted = set(self.classes or available)
        if missing := wanted - available:
            raise StageError(f"the source has no class {', '.join(sorted(missing))} (it has {len(available)} classes)")
        return set(sorted(wanted, key=self._rank)[: self.num_classes])

    def chosen_files(self, files: list[SourceFile]) -> list[SourceFile]:
        """Of the files of one group, the ones to take, sorted by name."""
        if self.images_per_class is None:
            return files
        return sorted(sorted(files, key=lambda file: self._rank(file.name))[: self.images_per_class], key=_by_name)

    def _rank(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class SourceUri:
    """`sample:target?seed=1` or `path/to/folder?images_per_class=50&classes=a,b`."""

    text: str
    location: str
    query: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "SourceUri":
        """Splits the query off."""
        location, _, query = text.partition("?")
        return cls(text, location, dict(parse_qsl(query, keep_blank_values=True)))

    def subset(self) -> Subset:
        """The part of the source that the query asks for.

        Raises:
            StageError: a key that does not exist, or a number that is none.
        """
        known = {"seed", "classes", "num_classes", "images_per_class"}
        if unknown := set(self.query) - known:
            names = ", ".join(sorted(unknown))
            raise StageError(f"source {self.text}: unknown {names} after the `?` (known: {', '.join(sorted(known))})")
        classes = self.query.get("classes")
        return Subset(
            seed=self._number("seed", 0) or 0,
            classes=frozenset(classes.split(",")) if classes else None,
            num_classes=self._number("num_classes", 1),
            images_per_class=self._number("images_per_class", 1),
        )

    def _number(self, key: str, least: int) -> int | None:
        text = self.query.get(key)
        if text is None:
            return None
        if not text.isdecimal() or int(text) < least:
            raise StageError(f"source {self.text}: `{key}` must be a whole number from {least} on, got {text!r}")
        return int(text)


def read_source(text: str, incoming: Path) -> Iterator[Group]:
    """The groups of a source, sorted by split and class; files are opened only when read.

    Args:
        text: URI of the source; a relative path resolves against `incoming`.
        incoming: folder of deliveries.

    Raises:
        StageError: no such source, or nothing in it that is a class of images.
    """
    uri = SourceUri.parse(text)
    subset = uri.subset()
    if uri.location.startswith("sample:"):
        return iter(_sample_groups(uri, subset))
    folder = incoming / uri.location.removeprefix("file://")
    if not folder.is_dir():
        raise StageError(
            f"no such source: {text} (looked for the folder {folder}; relative ones resolve against SYNSET_INCOMING). "
            f"If this batch was ingested before, `dvc pull` brings its raw tars back"
        )
    listed = _tiny_imagenet(folder) if (folder / "wnids.txt").is_file() else _image_folder(folder)
    if not listed:
        raise StageError(f"source {text}: {folder} holds no class folder (expected CLASS/*, or train/CLASS/*)")
    for (split, class_name), files in listed.items():
        if not files:
            raise StageError(f"{folder}: the class folder {split}/{class_name} has no file; fill it or remove it")
    return _chosen(listed, subset)


def _chosen(listed: dict[tuple[str, str], list[SourceFile]], subset: Subset) -> Iterator[Group]:
    classes = subset.chosen_classes(class_name for _, class_name in listed)
    for (split, class_name), files in sorted(listed.items(), key=lambda item: item[0]):
        if class_name in classes:
            yield Group(split, class_name, subset.chosen_files(sorted(files, key=_by_name)))


def _image_folder(folder: Path) -> dict[tuple[str, str], list[SourceFile]]:
    """`train/CLASS/*` with `val/` and `test/` where there are any, or one level of classes."""
    children = _folders(folder)
    names = {child.name for child in children}
    if "train" in names and names <= set(SPLITS):
        listed = {(split.name, each.name): _files(each) for split in children for each in _folders(split)}
    elif names & set(SPLITS) and any(_folders(child) for child in children if child.name in SPLITS):
        others = ", ".join(sorted(names - set(SPLITS))) or "no `train`"
        raise StageError(f"{folder} mixes split folders with others ({others}); expected train/ val/ test/, or classes")
    else:
        listed = {("all", child.name): _files(child) for child in children}
    return listed


def _tiny_imagenet(folder: Path) -> dict[tuple[str, str], list[SourceFile]]:
    """Tiny ImageNet's own layout: images of train in a folder a class, those of val in one, with a table of labels."""
    table = folder / "val" / "val_annotations.txt"
    if not table.is_file() or not (folder / "train").is_dir():
        raise StageError(f"{folder} has wnids.txt, but not Tiny ImageNet's train/ and val/val_annotations.txt")
    listed = {("train", each.name): _files(each / "images") for each in _folders(folder / "train")}
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        name, tab, rest = line.partition("\t")
        class_name = rest.split("\t")[0]
        if not tab or not class_name:
            raise StageError(f"{table}, line {number}: expected a file name, a tab and a wnid, found {line!r}")
        path = folder / "val" / "images" / name
        if not path.is_file():
            raise StageError(f"{table} names {name}, but {path} is not there")
        listed.setdefault(("val", class_name), []).append(SourceFile(name, _opener(path)))
    return listed


def _sample_groups(uri: SourceUri, subset: Subset) -> list[Group]:
    from stages.data.sample import SAMPLES, draw

    name = uri.location.removeprefix("sample:")
    if name not in SAMPLES:
        known = ", ".join(f"sample:{each}" for each in SAMPLES)
        raise StageError(f"no such source: {uri.text} (the built-in samples: {known})")
    listed: dict[tuple[str, str], list[SourceFile]] = {}
    for file in draw(name, subset.seed, subset.images_per_class):
        split, class_name, file_name = file.path.split("/")
        listed.setdefault((split, class_name), []).append(SourceFile(file_name, _bytes_opener(file.data)))
    classes = subset.chosen_classes(class_name for _, class_name in listed)
    return [Group(*key, files) for key, files in sorted(listed.items()) if key[1] in classes]


def _folders(folder: Path) -> list[Path]:
    found = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    for child in found:
        _check_name(child, child.name)
    return found


def _files(folder: Path) -> list[SourceFile]:
    """Every file below a class folder, images or not: what is none must show up in quarantine. Hidden ones are left.

    Raises:
        StageError: a folder cannot be read or links back into itself, or a name is not UTF-8.
    """
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        if (real := os.path.realpath(root)) in seen:
            raise StageError(f"{root} is a link to a folder that is read already ({real}); remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [_source_file(Path(root) / name, folder) for name in names if not name.startswith(".")]
    return files


def _refuse(error: OSError) -> None:
    raise StageError(f"{error.filename} cannot be read: {error.strerror}")


def _source_file(path: Path, folder: Path) -> SourceFile:
    name = path.relative_to(folder).as_posix()
    _check_name(path, name)
    return SourceFile(name, _opener(path))


def _check_name(path: Path, name: str) -> None:
    if not name.isprintable():
        what = "folder" if path.is_dir() else "file"
        raise StageError(f"{os.fsencode(path)!r}: the name is not UTF-8, or has control characters; rename the {what}")


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    def open_file() -> IO[bytes]:
        try:
            return path.open("rb")
        except OSError as error:
            raise StageError(f"{path} cannot be read: {error.strerror}") from error

    return open_file


def _bytes_opener(data: bytes) -> Callable[[], IO[bytes]]:
    return lambda: io.BytesIO(data)


def _by_name(file: SourceFile) -> str:
    return file.name
