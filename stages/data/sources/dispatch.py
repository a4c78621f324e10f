"""Sources: where images come from. Each is read as parts (stages/data/source_kinds/), whatever its layout."""

import hashlib
import io
import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

from stages.data.raw.images import IMAGE_SUFFIXES
from stages.data.sources.archives import Archive, first_image
from stages.data.sources.folders import KAGGLE, flat_folder, image_folder, is_flat, kaggle, tiny_imagenet
from stages.data.sources.locations import Entry, Place
from stages.data.sources.official import TRAIN, VAL, official
from stages.data.sources.parquet import parquet_shards
from stages.data.sources.parts import (
    Choice,
    Group,
    Image,
    Part,
    Ranks,
    SourceFile,
    rank,
    stamp_of,
)
from stages.data.sources.webdataset import webdataset_shards
from stages.runtime.command import StageError
from stages.runtime.progress import worker_count

__all__ = ["Group", "Source", "SourceFile", "read_source"]
logger = logging.getLogger(__name__)
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2")
SUBSET = {"seed", "classes", "num_classes", "images_per_class", "unlabelled"}
CHECKSUMS = {"sha256": 64, "md5": 32}
"""Digits of each, in hex."""
LAYOUT = "2"
"""Raised when the same source would give other tars: work in progress of before is then of no use."""


@dataclass(frozen=True)
class Source:
    """A source, listed: parts in an order that never changes, and which of their images are taken."""

    text: str
    parts: list[Part]
    choice: Choice
    is_remote: bool = False

    @property
    def listing(self) -> str:
        """Names, sizes, and etags or times of all that is read, as one line a part: another source has another."""
        lines = [f"{part.title}\t{part.stamp}\n" for part in self.parts]
        return f"{LAYOUT}\t{self.choice.listing}\n" + "".join(lines)

    def as_taken(self, image: Image) -> Image:
        """The image as it goes into the batch: where labels are forgotten, the class becomes part of the name."""
        if not self.choice.unlabelled or not image.class_name:
            return image
        return image._replace(class_name="", name=f"{image.class_name}/{image.name}")

    def whole_class(self, part: Part) -> tuple[str, str] | None:
        """Split and class where the part is all of one class, and is taken as such."""
        return None if self.choice.unlabelled else part.whole_class

    def check_classes(self, found: Iterable[str]) -> None:
        """Compares the classes that were asked for with those that the source turned out to have.

        Raises:
            StageError: one is not there.
        """
        available = set(found) - {""}
        if missing := (self.choice.classes or frozenset()) - available:
            raise StageError(
                f"source {self.text}: the source has no class {', '.join(sorted(missing))} "
                f"(it has {len(available)} classes)"
            )


@dataclass(frozen=True)
class SourceUri:
    """`sample:target?seed=1`, `path/to/folder?images_per_class=50&classes=a,b`, `https://host/x.tgz?sha256=...`."""

    text: str
    location: str
    query: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "SourceUri":
        """Splits the query off, at the last `?`: a URL may have a query of its own before it."""
        location, mark, query = text.rpartition("?")
        return cls(text, location, dict(parse_qsl(query, keep_blank_values=True))) if mark else cls(text, text)

    def check(self, *known: str) -> None:
        """Refuses keys that mean nothing for this kind of source.

        Raises:
            StageError: it has one.
        """
        if unknown := set(self.query) - {*known, *SUBSET}:
            names, allowed = ", ".join(sorted(unknown)), ", ".join(sorted({*known, *SUBSET}))
            hint = "; a URL that has a query of its own ends in another `?`" if "://" in self.location else ""
            raise StageError(f"source {self.text}: unknown {names} after the `?` (known here: {allowed}){hint}")

    def number(self, key: str, least: int) -> int | None:
        """A whole number.

        Raises:
            StageError: it is none, or less than `least`.
        """
        text = self.query.get(key)
        if text is None:
            return None
        if not text.isdecimal() or int(text) < least:
            raise StageError(f"source {self.text}: `{key}` must be a whole number from {least} on, got {text!r}")
        return int(text)

    def flag(self, key: str) -> bool:
        """`true` or `false`; not given is false.

        Raises:
            StageError: it is something else.
        """
        text = self.query.get(key, "false")
        if text not in ("true", "false"):
            raise StageError(f"source {self.text}: `{key}` must be true or false, got {text!r}")
        return text == "true"

    def checksum(self) -> tuple[str, str] | None:
        """Algorithm and value of the one that is given.

        Raises:
            StageError: it cannot be one.
        """
        for algorithm, digits in CHECKSUMS.items():
            if (value := self.query.get(algorithm)) is not None:
                if not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", value):
                    raise StageError(f"source {self.text}: `{algorithm}` must be {digits} hex digits, got {value!r}")
                return algorithm, value.lower()
        return None

    def classes(self, incoming: Path | str) -> frozenset[str] | None:
        """The classes that are asked for: `a,b`, or those in a file, a line each: `@file`, relative to `incoming`.

        Raises:
            StageError: the file cannot be read.
        """
        text = self.query.get("classes")
        if text and text.startswith("@"):
            return frozenset(filter(None, map(str.strip, Place.of(text[1:], incoming).lines())))
        return frozenset(text.split(",")) if text else None

    def class_names(self, incoming: Path | str) -> tuple[str, ...] | None:
        """The names of numbered classes: a file, a line a class, relative to `incoming`.

        Raises:
            StageError: the file cannot be read.
        """
        text = self.query.get("class_names")
        return tuple(map(str.strip, Place.of(text, incoming).lines())) if text else None


def read_source(text: str, incoming: Path | str) -> Source:
    """A source as its parts, sorted by split and class or by file; images are read only when asked for.

    `num_classes` and `images_per_class` of archives and shards first read the names of everything in them.

    Args:
        text: URI of the source; a relative path resolves against `incoming`.
        incoming: folder of deliveries, or a URL of one.

    Raises:
        StageError: no such source, or nothing in it that is a class of images.
    """
    uri = SourceUri.parse(text)
    uri.number("seed", 0)
    if uri.location.startswith("sample:"):
        uri.check()
        parts = _sample_parts(uri)
        rest = {key: value for key, value in uri.query.items() if key != "images_per_class"}
        return _chosen(replace(uri, query=rest), parts, incoming)
    place = Place.of(uri.location, incoming)
    parts = _parts(uri, place, incoming)
    return replace(_chosen(uri, parts, incoming), is_remote=not place.is_local)


def _parts(uri: SourceUri, place: Place, incoming: Path | str) -> list[Part]:
    path = place.address.partition("?")[0]
    if "{" in path or "*" in path:
        return _shards(uri, _expanded(uri, place), incoming)
    if path.endswith((".parquet", *ARCHIVES)):
        if not place.is_file():
            raise _missing(uri, f"the file {place}")
        if path.endswith(".parquet") or len(first_image(place)) == 1:
            return _shards(uri, [place], incoming)
        uri.check(*CHECKSUMS)
        return [Archive(place, stamp_of([place.entry()]), uri.checksum())]
    if not place.is_folder():
        raise _missing(uri, f"the folder {place}")
    if shards := _shards_below(place, place.entries()):
        if len(shards) == 1 and not shards[0].name.endswith(".tar"):  # rather an archive of class folders
            return _parts(uri, shards[0], incoming)
        return _shards(uri, shards, incoming)
    uri.check()
    return _folder_parts(uri, place)


def _folder_parts(uri: SourceUri, folder: Place) -> list[Part]:
    entries = folder.entries()
    names = {entry.name for entry in entries}
    if {TRAIN, VAL} & names:
        return official(folder)
    if "ILSVRC" in names or any(folder.child(each).is_folder() for each in KAGGLE) or folder.name == "CLS-LOC":
        return kaggle(folder)
    if "wnids.txt" in names:
        return tiny_imagenet(folder)
    if is_flat(entries):
        return flat_folder(folder)
    if not (parts := image_folder(folder)):
        raise StageError(f"source {uri.text}: {folder} holds no class folder (expected CLASS/*, or train/CLASS/*)")
    return parts


def _shards(uri: SourceUri, shards: list[Place], incoming: Path | str) -> list[Part]:
    """Parquet files or webdataset tars, told by their suffix."""
    suffixes = {shard.name.partition("?")[0].rpartition(".")[2] for shard in shards}
    named = _without_common(shards)
    if suffixes == {"parquet"}:
        uri.check("image", "label")
        columns = uri.query.get("image"), uri.query.get("label")
        return parquet_shards(named, uri.text, *columns, uri.flag("unlabelled"))
    if "parquet" in suffixes:
        raise StageError(f"source {uri.text} mixes Parquet files with others; name those to read, with `*`")
    uri.check("class_names")
    return webdataset_shards(named, uri.text, uri.class_names(incoming), not uri.flag("unlabelled"))


def _without_common(shards: list[Place]) -> dict[str, Place]:
    """Shards by their path, without the folders that all have in common and without suffixes."""
    parts = [shard.address.partition("?")[0].split("/") for shard in shards]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    return {
        re.sub(r"(\.parquet|\.tar|\.tar\.gz|\.tgz|\.tar\.bz2)$", "", "/".join(each[common:])): shard
        for each, shard in zip(parts, shards, strict=True)
    }


def _shards_below(folder: Place, entries: list[Entry], depth: int = 3) -> list[Place]:
    """The Parquet files or webdataset tars of a folder that holds such and no images, in it or in folders below."""
    files = [entry.name for entry in entries if not entry.is_folder]
    # Kaggle's and Tiny ImageNet's folders often have the archive that they came from beside them.
    if {TRAIN, VAL, "ILSVRC", "wnids.txt"} & {entry.name for entry in entries} or any(
        name.lower().endswith(IMAGE_SUFFIXES) for name in files
    ):
        return []
    for suffixes in ((".parquet",), ARCHIVES):
        if any(name.endswith(suffixes) for name in files):
            return [folder.child(entry.name) for entry in folder.files_below() if entry.name.endswith(suffixes)]
    folders = [entry.name for entry in entries if entry.is_folder]
    # A folder of class folders has a thousand of them: the first one tells what is in the others.
    if depth and folders:
        first = folder.child(folders[0])
        if _shards_below(first, first.entries(), depth - 1):
            names = [entry.name for entry in folder.files_below()]
            return [folder.child(name) for name in names if name.endswith((".parquet", *ARCHIVES))]
    return []


def _expanded(uri: SourceUri, place: Place) -> list[Place]:
    """The files that `name-{000..146}.tar` and `*` stand for, sorted.

    Raises:
        StageError: there is none.
    """
    found: list[Place] = []
    for address in _braces(uri, place.address):
        found += _globbed(Place(address)) if "*" in address else [Place(address)]
    if not found:
        raise _missing(uri, f"files {place}")
    for shard in found:
        if not shard.name.partition("?")[0].endswith((".parquet", *ARCHIVES)):
            raise StageError(f"source {uri.text}: {shard} is neither a Parquet file nor a tar")
        if "*" not in place.address and not shard.is_file():
            raise _missing(uri, f"the file {shard}")
    return sorted(set(found), key=str)


def _braces(uri: SourceUri, text: str) -> list[str]:
    head, brace, rest = text.partition("{")
    if not brace:
        return [text]
    inner, closed, tail = rest.partition("}")
    if not closed:
        raise StageError(f"source {uri.text}: a `{{` without `}}`")
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if bounds and int(bounds[2]) - int(bounds[1]) >= 10**6:
        raise StageError(f"source {uri.text}: {inner} are too many files")
    middles = inner.split(",")
    if bounds:
        middles = [f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    return [head + middle + end for middle in middles for end in _braces(uri, tail)]


def _globbed(place: Place) -> list[Place]:
    if place.is_local:
        pattern = Path(place.address)
        return [Place(str(path)) for path in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))]
    filesystem, path = place.filesystem()
    return [Place(filesystem.unstrip_protocol(each)) for each in filesystem.glob(path)]


def _missing(uri: SourceUri, what: str) -> StageError:
    return StageError(
        f"no such source: {uri.text} (looked for {what}; relative ones resolve against SYNSET_INCOMING). "
        f"If this batch was ingested before, `dvc pull` brings its raw tars back"
    )


def _chosen(uri: SourceUri, parts: list[Part], incoming: Path | str) -> Source:
    """The source with the subset that its query asks for."""
    seed, classes = uri.number("seed", 0) or 0, uri.classes(incoming)
    count, per_class = uri.number("num_classes", 1), uri.number("images_per_class", 1)
    known = None
    if all(part.whole_class for part in parts):
        known = {part.whole_class[1] for part in parts if part.whole_class}
    unlabelled = uri.flag("unlabelled")
    choice = Choice(seed, classes, None, unlabelled)
    ranks: Ranks | None = None
    if per_class is not None or (count is not None and known is None):
        ranks = _listing_pass(uri, parts, seed, per_class)
        known = {class_name for _, class_name in ranks.lowest if class_name}
    if known is not None:
        Source(uri.text, parts, choice).check_classes(known)
    if count is not None and known is not None:
        choice = replace(choice, classes=frozenset(sorted(classes or known, key=partial(rank, seed))[:count]))
    if per_class is not None and ranks is not None:
        choice = replace(choice, limits=ranks.limits())
    taken = choice.classes
    if taken is not None:
        parts = [part for part in parts if part.whole_class is None or part.whole_class[1] in taken]
    return Source(uri.text, parts, choice)


def _listing_pass(uri: SourceUri, parts: list[Part], seed: int, per_class: int | None) -> Ranks:
    if not all(part.whole_class for part in parts):
        logger.info("%s: reading the names of everything first, to choose from them", uri.text)
    all_ranks = Ranks(seed, per_class)
    with ThreadPoolExecutor(worker_count()) as pool:
        for found in pool.map(partial(_ranks, seed=seed, count=per_class), parts):
            all_ranks.join(found)
    return all_ranks


def _ranks(part: Part, seed: int, count: int | None) -> Ranks:
    found = Ranks(seed, count)
    for name in part.names():
        found.see(name)
    return found


def _sample_parts(uri: SourceUri) -> list[Part]:
    from stages.data.sources.sample import SAMPLES, draw

    name = uri.location.removeprefix("sample:")
    if name not in SAMPLES:
        known = ", ".join(f"sample:{each}" for each in SAMPLES)
        raise StageError(f"no such source: {uri.text} (the built-in samples: {known})")
    listed: dict[tuple[str, str], list[SourceFile]] = {}
    for file in draw(name, uri.number("seed", 0) or 0, uri.number("images_per_class", 1)):
        split, class_name, file_name = file.path.split("/")
        listed.setdefault((split, class_name), []).append(SourceFile(file_name, partial(io.BytesIO, file.data)))
    return [Group(*key, files, hashlib.sha256(uri.text.encode()).hexdigest()) for key, files in sorted(listed.items())]
