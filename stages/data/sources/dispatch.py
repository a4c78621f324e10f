"""Reads a source of any kind as parts. A kind is a module, and here a row of FOLDER_KINDS or a branch in `_parts`."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from stages.data.raw.images import SOURCE_SUFFIXES
from stages.data.sources.archives import ArchiveNames, GoOn, archive_names, archives, is_webdataset, is_zip
from stages.data.sources.folders import (
    flat_folder,
    image_folder,
    is_flat,
    is_kaggle,
    is_tiny_imagenet,
    kaggle,
    tiny_imagenet,
)
from stages.data.sources.grouping import COLUMN, FIELD, Grouping, group_field
from stages.data.sources.layouts import KEYS as LAYOUT_KEYS
from stages.data.sources.layouts import Options
from stages.data.sources.locations import Entry, Location
from stages.data.sources.official import TRAIN, VAL, is_official, official
from stages.data.sources.parquet import Columns, parquet_shards
from stages.data.sources.parts import Image, LeftOut, Listed, Name, Part, ShardPart
from stages.data.sources.sample import SAMPLES, sample_parts
from stages.data.sources.subset import Choice, choose
from stages.data.sources.uri import ARCHIVES, CHECKSUMS, SUBSET, SourceUri, expanded, missing_source
from stages.data.sources.webdataset import Fields, webdataset_shards
from stages.runtime.command import StageError

LAYOUT = "6"
"""Raised when the same source gives other tars than before, or another done.json: work begun is then of no use."""

FIRST_NAMES = 1_000
"""So many tell whether the first of several tars is a webdataset shard."""
WEBDATASET_KEYS = {"image", "label", "class_names"}


class FolderKind(NamedTuple):
    """A layout of folders of images."""

    recognises: Callable[[Location, list[Entry]], bool]
    """Takes the folder and its entries."""
    listed: Callable[[Location], Listed]


FOLDER_KINDS = (
    FolderKind(is_official, official),
    FolderKind(is_kaggle, kaggle),
    FolderKind(is_tiny_imagenet, tiny_imagenet),
    FolderKind(is_flat, flat_folder),
)
"""The first one that recognises a folder reads it; `image_folder` all others."""


@dataclass(frozen=True)
class Source:
    """A listed source: parts in an order that never changes, and which of their images are taken."""

    text: str
    parts: list[Part]
    choice: Choice
    is_remote: bool = False
    layout: str = ""
    """In words; `notes` and `left_out` as in Listed."""
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    chosen: str = ""
    """What the query asks for, `images_per_class=50, seed=1`; `classes_left` are those that it does not take at all."""
    classes_left: int = 0
    grouping: Grouping = field(default_factory=Grouping)

    @property
    def listing(self) -> str:
        """Names, sizes, and etags or times of all that is read, one line per part: it changes with the source."""
        lines = [f"{part.title}\t{part.stamp}\n" for part in self.parts]
        return f"{LAYOUT}\t{self.choice.listing}\t{self.grouping.text}\n" + "".join(lines)

    def as_taken(self, image: Image) -> Image:
        """The image as it goes into the batch, with its group; where labels are forgotten, the class is in the name."""
        image = image._replace(group=self.group_of(image) or "", name=self._name(image))
        return image._replace(class_name="") if self.choice.unlabelled else image

    def group_of(self, image: Image | Name) -> str | None:
        """Its group, empty if it is in none; None if nobody asked for groups."""
        return self.grouping.group_of(self._name(image), image.group) if self.grouping.text else None

    def whole_class(self, part: Part) -> tuple[str, str] | None:
        """Split and class where the part is all of one class, and is taken as such."""
        return None if self.choice.unlabelled else part.whole_class

    def _name(self, image: Image | Name) -> str:
        return f"{image.class_name}/{image.name}" if self.choice.unlabelled and image.class_name else image.name


def read_source(text: str, incoming: Path | str, go_on: GoOn | None = None) -> Source:
    """A source as its parts, sorted by split and class or by file; images are read only when asked for.

    `num_classes` and `images_per_class` of archives and shards first read the names of everything in them.

    Args:
        text: URI of the source; a relative path resolves against `incoming`.
        incoming: folder of deliveries, or a URL of one.
        go_on: asked after each name in an archive; where it says no, the names so far tell the layout (a preview).

    Raises:
        StageError: no such source, or nothing in it that is a class of images.
    """
    uri = SourceUri.parse(text)
    uri.number("seed", 0)
    grouping = Grouping.of(uri)
    if uri.address.startswith("sample:"):
        uri.check()
        listed, is_remote = _sample(uri), False
        chosen = replace(uri, query={key: value for key, value in uri.query.items() if key != "images_per_class"})
    else:
        location, chosen = Location.of(uri.address, incoming), uri
        listed, is_remote = _listed(uri, location, incoming, go_on), not location.is_local
    if not any(isinstance(part, ShardPart) for part in listed.parts):
        group_field(uri, "")
    parts, choice = choose(chosen, listed.parts, incoming)
    asked = ", ".join(f"{key}={value}" for key, value in uri.query.items() if key in SUBSET)
    left = len(_classes(listed.parts) - _classes(parts))
    return Source(text, parts, choice, is_remote, listed.layout, listed.notes, listed.left_out, asked, left, grouping)


def _listed(uri: SourceUri, location: Location, incoming: Path | str, go_on: GoOn | None) -> Listed:
    path = location.address.partition("?")[0]
    if "{" in path or "*" in path:
        return _shards(uri, expanded(uri, location), incoming, go_on)
    if path.lower().endswith((".parquet", *ARCHIVES)) and not (location.is_local and location.is_folder()):
        if not location.is_file():
            raise missing_source(uri, f"the file {location}")
        return _shards(uri, [location], incoming, go_on)
    if not location.is_folder():
        raise missing_source(uri, f"the folder {location}")
    entries = location.entries()
    if shards := _shards_below(location, entries):
        return _shards(uri, shards, incoming, go_on)
    kind = next((kind for kind in FOLDER_KINDS if kind.recognises(location, entries)), None)
    if kind is None:
        uri.check(*LAYOUT_KEYS)
        return image_folder(location, Options.of(uri))
    uri.check()
    return kind.listed(location)


def _shards(uri: SourceUri, shards: list[Location], incoming: Path | str, go_on: GoOn | None) -> Listed:
    """Parquet files, webdataset tars, or archives of class folders: told by suffix, and by the names in them."""
    suffixes = {shard.name.partition("?")[0].lower().rpartition(".")[2] for shard in shards}
    named = _without_common(shards)
    if suffixes == {"parquet"}:
        uri.check("image", "label")
        given = uri.query.get("image"), uri.query.get("label"), uri.unlabelled() == "true"
        return parquet_shards(named, uri.text, Columns(*given, group_field(uri, COLUMN)))
    if "parquet" in suffixes:
        raise StageError(f"source {uri.text} mixes Parquet files with others; name those to read, with `*`")
    if (names := _names_in(uri, named, go_on)) is not None:
        uri.check(*LAYOUT_KEYS, *(CHECKSUMS if len(shards) == 1 else ()))
        return archives(names, named, Options.of(uri), uri)
    uri.check("image", "label", "class_names")
    image = uri.query.get("image")
    class_names, labelled = uri.class_names(incoming), uri.unlabelled() != "true"
    fields = Fields(image and image.lower(), uri.query.get("label"), class_names, labelled, group_field(uri, FIELD))
    return webdataset_shards(named, uri.text, fields)


def _names_in(uri: SourceUri, named: dict[str, Location], go_on: GoOn | None) -> dict[str, ArchiveNames] | None:
    """The names in archives of class folders; None for webdataset shards, which the first of several tells."""
    first = next(iter(named.values()))
    if not any(map(is_zip, named.values())):
        if uri.query.keys() & WEBDATASET_KEYS:
            return None
        names = archive_names(first, go_on, FIRST_NAMES if len(named) > 1 else None)
        if is_webdataset(names):
            return None
        if len(named) == 1:
            return {next(iter(named)): names}
    return {below: archive_names(location, go_on) for below, location in named.items()}


def _without_common(shards: list[Location]) -> dict[str, Location]:
    """Shards by their path, without the folders that all have in common and without suffixes."""
    parts = [shard.address.partition("?")[0].split("/") for shard in shards]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    return {
        re.sub(r"(?i)(\.parquet|\.zip|\.tar|\.tar\.gz|\.tgz|\.tar\.bz2)$", "", "/".join(each[common:])): shard
        for each, shard in zip(parts, shards, strict=True)
    }


def _shards_below(folder: Location, entries: list[Entry], depth: int = 3) -> list[Location]:
    """The Parquet files or webdataset tars of a folder that holds such and no images, in it or in folders below."""
    files = [entry.name for entry in entries if not entry.is_folder]
    # Kaggle's and Tiny ImageNet's folders often have the archive that they came from beside them.
    if {TRAIN, VAL, "ILSVRC", "wnids.txt"} & {entry.name for entry in entries} or any(
        name.lower().endswith(SOURCE_SUFFIXES) for name in files
    ):
        return []
    folders = [entry.name for entry in entries if entry.is_folder]
    for suffixes in ((".parquet",), ARCHIVES):
        if any(name.lower().endswith(suffixes) for name in files):
            found = [entry.name for entry in folder.files_below()]
            # Others have folders of images and, beside them, an archive of labels or the one that they came from.
            if folders and any(name.lower().endswith(SOURCE_SUFFIXES) for name in found):
                return []
            return [folder.child(name) for name in found if name.lower().endswith(suffixes)]
    # A folder of class folders has a thousand of them: the first one tells what is in the others.
    if depth and folders:
        first = folder.child(folders[0])
        if _shards_below(first, first.entries(), depth - 1):
            names = [entry.name for entry in folder.files_below()]
            if not any(name.lower().endswith(SOURCE_SUFFIXES) for name in names):
                return [folder.child(name) for name in names if name.lower().endswith((".parquet", *ARCHIVES))]
    return []


def _classes(parts: list[Part]) -> set[str]:
    return {part.whole_class[1] for part in parts if part.whole_class}


def _sample(uri: SourceUri) -> Listed:
    name = uri.address.removeprefix("sample:")
    if name not in SAMPLES:
        known = ", ".join(f"sample:{each}" for each in SAMPLES)
        raise StageError(f"no such source: {uri.text} (the built-in samples: {known})")
    stamp = hashlib.sha256(uri.text.encode()).hexdigest()
    return sample_parts(name, uri.number("seed", 0) or 0, uri.number("images_per_class", 1), stamp)
