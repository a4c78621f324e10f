"""Parts: a source is a list of them, each readable by itself, in one pass, image after image."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

from stages.data.sources.locations import Entry, Hidden, Location, check_name
from stages.runtime.command import StageError

SPLITS = ("train", "val", "test")
STRONG = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
STRONG |= {"validate": "val", "test": "test", "testing": "test"}
SPLIT_WORDS = STRONG | {"trn": "train", "dev": "val", "development": "val", "eval": "val", "evaluation": "val"}
SPLIT_WORDS |= {"holdout": "test", "tst": "test"}
"""Of which those that are not in STRONG have other meanings too: alone they tell nothing."""
ENDINGS = re.compile(r"(?<=[a-z]{3})(sets?|data|images?|imgs?|split|folder)$")


class Image(NamedTuple):
    """One file of a part, images or not; `data` is read before the part is asked for the next."""

    split: str
    class_name: str  # empty: unlabelled
    name: str  # unique in its class and split
    size: int  # in bytes
    data: IO[bytes]
    title: str = ""  # what the source calls the class, where `class_name` had to differ from it
    group: str = ""  # of images that belong together, where a part itself tells it (`grouping.py`)


class Name(NamedTuple):
    """An image without its bytes."""

    split: str
    class_name: str
    name: str
    title: str = ""
    group: str = ""


class LeftOut(NamedTuple):
    """A file that is not taken. Counted in the account by `why`, which is the same for all of a kind: no name in it."""

    name: str  # within the source, never a path of this machine: an example for people
    why: str
    files: int = 1


class Noted(NamedTuple):
    """An image that is taken in another way than it came: converted, renamed, guessed. Counted by `what`."""

    name: str
    what: str
    files: int = 1


class Part:
    """What one worker reads in one pass. Every kind of source has a class of its own for its parts."""

    stamp: str
    """Changes with the content: made of names, sizes, and etags or times."""
    file_count: int | None = None
    """How many there are, where the listing told."""

    @property
    def title(self) -> str:
        """For people, and unique within the source."""
        raise NotImplementedError

    @property
    def whole_class(self) -> tuple[str, str] | None:
        """Split and class where the part is all of one class in one split; else None."""
        return None

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """Every file, in an order that never changes, and among them what is to be said of them."""
        raise NotImplementedError

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        """The same without the bytes."""
        for item in self.images():
            if isinstance(item, Image):
                yield Name(item.split, item.class_name, item.name, item.title, item.group)
            else:
                yield item


def hidden_files(hidden: Hidden, folder: str = "") -> tuple[LeftOut, ...]:
    """What a listing of `folder` counted, if there is any."""
    return (LeftOut(folder + hidden.name, "hidden file or folder", hidden.files),) if hidden.files else ()


class Listed(NamedTuple):
    """A source as it was listed: its parts, and what a person should know of how it was understood."""

    layout: str
    """In words: `class folders in train/ and val/`."""
    parts: list[Part]
    notes: tuple[str, ...] = ()
    """Sentences on what was guessed or renamed: `valid/ is read as val`."""
    left_out: tuple[LeftOut, ...] = ()
    """Files and folders that no part has."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a class as the source has it; `name` is relative to the class."""

    name: str
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Group(Part):
    """The files of one class in one split of a source, at hand. A source without splits has the split `all`."""

    split: str
    class_name: str
    files: list[SourceFile]
    stamp: str = ""

    @property
    def title(self) -> str:
        return f"{self.split}/{self.class_name}"

    @property
    def whole_class(self) -> tuple[str, str] | None:
        return self.split, self.class_name

    def images(self) -> Iterator[Image | LeftOut | Noted]:
        """Every file, as listed."""
        for file in self.files:
            with file.open() as data:
                size = data.seek(0, 2)
                data.seek(0)
                yield Image(self.split, self.class_name, file.name, size, data)

    def names(self) -> Iterator[Name | LeftOut | Noted]:
        for file in self.files:
            yield Name(self.split, self.class_name, file.name)


@dataclass(frozen=True)
class ShardPart(Part):
    """One file of a source that consists of shards; `below` is its path in the folder of all, without suffix."""

    location: Location
    split: str
    below: str
    stamp: str

    @property
    def title(self) -> str:
        return self.below


def stamp_of(entries: Iterable[Entry]) -> str:
    """One stamp for a listing of files."""
    listing = hashlib.sha256()
    for entry in entries:
        listing.update(f"{entry.name}\0{entry.size}\0{entry.stamp}\n".encode("utf-8", "surrogateescape"))
    return listing.hexdigest()


def check_class(name: str, where: str) -> str:
    """The name of a class as it is.

    Raises:
        StageError: it cannot name a class: empty, `.` or `..`, with `/`, unprintable, or too long for a file.
    """
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name.encode()) > 200:
        raise StageError(
            f"{where}: {name[:200]!r} cannot name a class (1 to 200 printable characters, not `.` or `..`, without `/`)"
        )
    return name


class Unique:
    """Refuses a name that comes twice; remembers 8 bytes of each, not the names."""

    def __init__(self, where: str) -> None:
        self._where, self._seen = where, set[int]()

    def check(self, *path: str) -> None:
        """Takes a name in.

        Raises:
            StageError: it was there before.
        """
        text = "/".join(path)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        known = len(self._seen)
        self._seen.add(int.from_bytes(digest, "big"))
        if len(self._seen) == known:
            raise StageError(f"{self._where}: {text} is in it twice; rename one or remove it")


def split_in(name: str, strong: bool = False) -> str | None:
    """The split that a name of a file or folder tells: `train-00000-of-00294`, `imagenet-val-000003`, `TestSet`.

    A name that tells two tells none. `strong`: only words that mean nothing else (`dev` and `eval` may).
    """
    known = STRONG if strong else SPLIT_WORDS
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    found = {known[word] for word in (ENDINGS.sub("", word) for word in words) if word in known}
    return found.pop() if len(found) == 1 else None


def is_split_word(name: str) -> bool:
    """Whether a name is one word for a split, as `Training`, `valid` or `test_set`: no class is called so by chance."""
    letters = re.sub(r"[\W\d_]+", "", name.lower())
    return ENDINGS.sub("", letters) in SPLIT_WORDS


def splits_of(paths: Iterable[str], where: str) -> dict[str, str]:
    """The split of each file by its name, else by its folder's; `all` where none tells one.

    Raises:
        StageError: some tell a split and others do not.
    """
    found = _splits(paths)
    if "train" not in found.values():  # `nuclei-dev.tar` alone holds nothing out
        found = _splits(found, strong=True)
    without = sorted(path for path, split in found.items() if split is None)
    if without and len(without) < len(found):
        raise StageError(f"{where}: the name of {without[0]} tells no split (train, val, test), as those of others do")
    return {path: split or "all" for path, split in found.items()}


def _splits(paths: Iterable[str], strong: bool = False) -> dict[str, str | None]:
    parted = {path: path.rpartition("/") for path in paths}
    return {
        path: split_in(name, strong) or split_in(folder.rpartition("/")[2], strong)
        for path, (folder, _, name) in parted.items()
    }


def check_path(path: str, where: str) -> list[str] | None:
    """A member's name inside an archive as its parts; None for a hidden one, which is left out.

    Raises:
        StageError: it leads out of the archive, or cannot be shown.
    """
    if path.startswith("/") or ".." in path.split("/"):
        raise StageError(f"{where}: the member {path[:200]!r} leads out of the archive; nothing of it is taken")
    check_name(f"{where}: {path}", path, "file and make the archive again")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return None if not parts or any(part.startswith(".") for part in parts) else parts
