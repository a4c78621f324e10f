"""Which folders of a source are splits and which are classes: decided by what lies in all of them, and said in words.

The rules are the same for folders and archives (`Tree`). What could be read in two ways is an error that shows both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

from stages.data.raw.images import IMAGE_SUFFIXES
from stages.data.sources.parts import LeftOut, Name, check_class, is_split_word, split_in
from stages.data.sources.uri import SourceUri
from stages.runtime.command import StageError

Path = tuple[str, ...]
"""Folders from the source down."""

JUNK = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"})
JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
NO_IMAGES: tuple[str, ...] = (
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".xml",
    ".yaml",
    ".yml",
    ".md",
    ".rst",
    ".html",
    ".htm",
    ".pdf",
)
NO_IMAGES = (*NO_IMAGES, ".py", ".ipynb", ".sh", ".log", ".mat", ".npy", ".npz", ".pkl", ".names", ".db", ".ini")
NO_IMAGES = (*NO_IMAGES, ".zip", ".gz", ".tar", ".tgz", ".bz2", ".parquet", ".docx", ".xlsx", ".license")
NO_IMAGE_NAMES = frozenset({"readme", "license", "licence", "copying", "makefile", "changelog"})
FEW = 16
"""Class folders that tell what is in the others."""
DEEPEST = 8
"""Folders above the classes."""
OUTSIDE = "file outside of the class folders"
ABOVE = "image above the class folders"
BESIDE = "file in a folder without an image"
SYSTEM = "put there by an operating system"
ASKED = "left out as `leave_out` asks"
KEYS = ("class_level", "leave_out", "splits")
"""Of a query: how class folders are found."""


class Inside(NamedTuple):
    """What one folder holds, in counts of files."""

    images: int = 0  # directly in it: files that may be images
    others: int = 0  # directly in it
    below: Mapping[str, int] = MappingProxyType({})  # folder in it -> what may be images there, at any depth
    others_below: int = 0
    surely: int = 0  # directly in it: files with the suffix of an image
    example: str = ""

    @property
    def all_images(self) -> int:
        """At any depth."""
        return self.images + sum(self.below.values())


class Tree(Protocol):
    """The folders of a source, wherever it is."""

    where: str

    def folders(self, path: Path) -> list[str]:
        """Names of the folders in a folder, sorted."""

    def direct(self, path: Path) -> Inside:
        """What lies directly in a folder; nothing of what is below."""

    def inside(self, paths: Sequence[Path]) -> list[Inside]:
        """What lies in each of these folders, at any depth."""


@dataclass(frozen=True)
class Options:
    """What the query of a source says about its folders."""

    class_level: int | None = None
    leave_out: tuple[str, ...] = ()
    splits: bool = True
    unlabelled: str = "false"

    @classmethod
    def of(cls, uri: SourceUri) -> "Options":
        """Those of a query.

        Raises:
            StageError: a value makes no sense.
        """
        named = tuple(name.strip("/") for name in uri.query.get("leave_out", "").split(",") if name.strip("/"))
        if (splits := uri.query.get("splits", "true")) not in ("true", "false"):
            raise StageError(f"source {uri.text}: `splits` must be true or false, got {splits!r}")
        return cls(uri.number("class_level", 1), named, splits == "true", uri.unlabelled())


class Root(NamedTuple):
    """A folder of class folders that is one split; a flat one holds images without classes."""

    split: str
    path: Path
    is_flat: bool = False


@dataclass
class Layout:
    """Where splits and classes are; `dropped` has the folders that are not read, with the reason."""

    roots: list[Root]
    level: int = 1
    """The class is the so-many-th folder below a root."""
    notes: list[str] = field(default_factory=list)
    dropped: dict[Path, str] = field(default_factory=dict)
    asked: str = "false"
    """The query's `unlabelled`: true, all are taken without labels; skip, those without are not taken."""
    classes: dict[Path, Inside] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """For people."""
        above = [root.path[: _split_depth(root) - 1] if self.has_splits else root.path for root in self.roots]
        top = "/".join(above[0])
        inside = f" in {top}/" if top else ""
        level = f" (folders {self.level} levels down)" if self.level > 1 else ""
        if all(root.is_flat for root in self.roots):
            return f"{'split folders of ' if self.has_splits else ''}images without classes{inside}"
        return f"{'split folders with ' if self.has_splits else ''}class folders{level}{inside}"

    @property
    def has_splits(self) -> bool:
        """Whether the source has any of its own."""
        return self.roots[0].split != "all"

    @property
    def unlabelled(self) -> bool:
        """Whether all images are taken, without labels."""
        return self.asked == "true"

    def class_of(self, root: Root, path: Path) -> str:
        """The class that a folder at or below the class folders is of."""
        return path[len(root.path) + self.level - 1]

    def place(self, path: list[str], where: str) -> Name | LeftOut:
        """What a file is: an image's split, class and name, or why it is left out.

        Raises:
            StageError: its class cannot be named.
        """
        folders, shown = tuple(path[:-1]), "/".join(path)
        if self.dropped and (why := self._dropped(folders)):
            return LeftOut(shown, why)
        if is_junk(shown):
            return LeftOut(shown, SYSTEM)
        for root in self.roots:
            depth = len(root.path)
            if folders[:depth] != root.path:
                continue
            rest = path[depth:]
            if root.is_flat:
                return Name(root.split, "", "/".join(rest))
            if len(rest) > self.level:
                name = "/".join(rest[1:] if self.level == 1 else rest)
                return Name(root.split, check_class(rest[self.level - 1], where), name)
            if self.unlabelled and is_image(path[-1]):
                return Name(root.split, "", "/".join(rest))
        return LeftOut(shown, ABOVE if is_image(path[-1]) else OUTSIDE)

    def _dropped(self, folders: Path) -> str | None:
        found = (self.dropped.get(folders[:depth]) for depth in range(1, len(folders) + 1))
        return next((why for why in found if why), None)


def is_image(name: str) -> bool:
    """By the suffix of a file."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_junk(path: str) -> bool:
    """Whether an operating system put a file there: resource forks, thumbnails."""
    return not JUNK.isdisjoint(path.split("/")[:-1])


def may_be_image(name: str) -> bool:
    """Whether nothing in a file's name speaks against it: images without a suffix, or with an odd one, are common."""
    lower = name.lower()
    return not lower.endswith(NO_IMAGES) and lower not in NO_IMAGE_NAMES and lower not in JUNK_FILES


def count_inside(names: Iterable[str]) -> Inside:
    """Counts files, named relative to the folder."""
    images = others = others_below = surely = 0
    below: dict[str, int] = {}
    example = ""
    for name in names:
        folder, slash, _ = name.partition("/")
        fits = may_be_image(name.rpartition("/")[2])
        if slash and folder not in JUNK:
            below[folder] = below.get(folder, 0) + fits
            others_below += not fits
        elif not slash:
            images, others, surely = images + fits, others + (not fits), surely + is_image(name)
            example = example or name
    return Inside(
        images, others, {name: count for name, count in below.items() if count}, others_below, surely, example
    )


def understand(tree: Tree, options: Options) -> Layout:
    """Finds splits and classes in a tree.

    Raises:
        StageError: there are none, or the folders can be read in more than one way.
    """
    return _LayoutReading(tree, options).layout()


class _LayoutReading:
    """One tree on the way to its layout."""

    def __init__(self, tree: Tree, options: Options) -> None:
        self._tree, self._options = tree, options
        self._notes: dict[str, None] = {}
        self._dropped: dict[Path, str] = {}
        self._left_out: set[str] = set()

    def layout(self) -> Layout:
        level = self._options.class_level or 1
        roots = self._roots(())
        while True:
            classes = {root: self._classes(root, level) for root in roots}
            if (again := self._roots(())) == roots:
                break
            roots = again  # folders turned out to hold no images
        train = {path[-1] for root in roots if root.split == "train" for path in classes[root]}
        placed = {root: self._placed(root, classes[root], train) for root in roots}
        found = {
            path: inside
            for root, place in placed.items()
            if place and not place.is_flat
            for path, inside in classes[root].items()
        }
        kept = [place for place in placed.values() if place]
        layout = Layout(kept, level, list(self._notes), self._dropped, self._options.unlabelled, found)
        if missing := [name for name in self._options.leave_out if name not in self._left_out]:
            raise StageError(f"{self._tree.where}: `leave_out` names {missing[0]}, and no such folder was found")
        if not any(root.split in ("all", "train") for root in kept):
            raise StageError(f"{self._tree.where} holds no class folder (expected CLASS/*, or train/CLASS/*)")
        self._check(layout)
        return layout

    def _roots(self, path: Path) -> list[Root]:
        """The split folders, or the one folder of classes: both below any number of lone folders around all."""
        while True:
            folders = self._folders(path)
            if self._options.splits and (splits := self._splits(path, folders)):
                return [Root(split, self._unwrapped((*path, name))) for name, split in splits.items()]
            if len(folders) != 1 or not self._is_wrapper((*path, folders[0])):
                return [Root("all", () if self._options.class_level else path)]
            path = (*path, folders[0])

    def _unwrapped(self, path: Path) -> Path:
        """Below lone folders of class folders; where the query has `class_level`, that counts them."""
        folders = self._folders(path)
        while not self._options.class_level and len(folders) == 1 and self._is_wrapper((*path, folders[0])):
            path = (*path, folders[0])
            folders = self._folders(path)
        return path

    def _is_wrapper(self, path: Path) -> bool:
        """Whether a lone folder is one around class folders, rather than a class."""
        folders = self._folders(path)
        if not folders or len(path) > DEEPEST:
            return False
        # `cat/1.jpg` and `cat/more/2.jpg` are a class; `set/preview.jpg` and `set/images/cat/1.jpg` are none.
        return not self._tree.direct(path).surely or len(folders) > 1 or bool(self._folders((*path, folders[0])))

    def _folders(self, path: Path) -> list[str]:
        found = []
        for name in self._tree.folders(path):
            child = (*path, name)
            asked = {name, "/".join(child)} & set(self._options.leave_out)
            self._left_out |= asked
            if name in JUNK or asked or child in self._dropped:
                self._dropped.setdefault(child, ASKED if asked else SYSTEM)
            else:
                found.append(name)
        return found

    # ------------------------------------------------------------------------------------------------------- splits

    def _splits(self, path: Path, folders: list[str]) -> dict[str, str]:
        """Folder -> split, where the folders are splits; empty where they are none.

        Raises:
            StageError: they can be read as both, or two folders are one split.
        """
        named = {name: split for name in folders if (split := split_in(name))}
        if "train" not in named.values():
            named = {name: split for name in folders if (split := split_in(name, strong=True))}
        words, several = list(filter(is_split_word, named)), len(set(named.values())) > 1
        nested = [name for name in named if self._tree.folders((*path, name))]
        others = [name for name in folders if name not in named]
        if others and (nested or several):
            others = self._with_images(path, others)
        if others:
            is_clear = (several and (words or nested)) or any(name in words for name in nested)
        else:  # `bullet-train` and `steam-train` are classes, and one such folder is one around all
            is_clear = bool(words or (several and len(set(named.values())) == len(named)) or len(nested) > 1)
        if not is_clear:
            self._note_classes(words)
            return {}
        self._check_splits(path, named, others)
        self._note_splits(named)
        return named

    def _with_images(self, path: Path, names: list[str]) -> list[str]:
        """Those of some folders that hold any; the others are left out."""
        inside = dict(zip(names, self._tree.inside([(*path, name) for name in names]), strict=True))
        for name, each in inside.items():
            if not each.all_images:
                self._dropped[(*path, name)] = BESIDE
        return [name for name, each in inside.items() if each.all_images]

    def _check_splits(self, path: Path, named: dict[str, str], others: list[str]) -> None:
        here = "/".join((self._tree.where, *path))
        shown = ", ".join(f"{name}/" for name in named)
        if others:
            raise StageError(
                f"{here} mixes split folders with others: {shown} are splits by their names, and "
                f"{some(f'{name}/' for name in others)} not. Leave the others out with ?leave_out={_query(others)}; "
                f"or, if all are classes, ?splits=false"
            )
        doubles = [name for name, split in named.items() if list(named.values()).count(split) > 1]
        if doubles:
            split = named[doubles[0]]
            same = [name for name in doubles if named[name] == split]
            raise StageError(
                f"{here} has {len(same)} folders for one split: {' and '.join(f'{name}/' for name in same)} both mean "
                f"{split}. Leave one out with ?leave_out={same[-1]}; or, if all are classes, ?splits=false"
            )
        if "train" not in named.values():
            raise StageError(
                f"{here} has split folders ({shown}) and no `train` among them. Bring train too; or name "
                f"one folder as the source, which makes it one pool of images; or, if they are classes, ?splits=false"
            )

    def _note_splits(self, named: dict[str, str]) -> None:
        for name, split in named.items():
            if name != split:
                self._notes[f"{name}/ is read as the split {split}"] = None

    def _note_classes(self, words: list[str]) -> None:
        for name in words:
            self._notes[f"{name}/ is read as a class, as it holds images like the folders beside it"] = None

    # ------------------------------------------------------------------------------------------------------ classes

    def _classes(self, root: Root, level: int) -> dict[Path, Inside]:
        """Class folders of a root and what is in them."""
        paths = [root.path]
        for _ in range(level):
            paths = [(*path, name) for path in paths for name in self._folders(path)]
        found = dict(zip(paths, self._tree.inside(paths), strict=True))
        if any(each.all_images for each in found.values()):
            for path, each in list(found.items()):
                if not each.all_images and each.others + each.others_below:
                    self._dropped[path] = BESIDE
                    del found[path]
                    self._notes[f"{'/'.join(path)}/ is no class: no file in it looks like an image"] = None
        return found

    def _placed(self, root: Root, classes: dict[Path, Inside], train: set[str]) -> Root | None:
        """The root as it is read: flat where it has images and no class folder, as `val/images/*` has; None: nothing.

        `train` has the classes of train.
        """
        imaged = [path for path, each in classes.items() if each.all_images]
        if not imaged and self._tree.direct(root.path).images:
            self._dropped |= dict.fromkeys(classes, BESIDE)
            return root._replace(is_flat=True)
        if not classes:
            self._notes[f"{'/'.join(root.path)}/ is empty and left out"] = None
            return None
        lone = len(imaged) == 1 and len(imaged[0]) == len(root.path) + 1 and not classes[imaged[0]].below
        if root.split != "all" and lone and len(train) > 1 and imaged[0][-1] not in train:
            return Root(root.split, imaged[0], is_flat=True)
        return root

    # ------------------------------------------------------------------------------------------------------- checks

    def _check(self, layout: Layout) -> None:
        where = self._tree.where
        for path, inside in layout.classes.items():
            if not inside.all_images + inside.others + inside.others_below:
                shown = "/".join(path)
                raise StageError(f"{where}/{shown}: the class folder {shown} has no file; fill it or remove it")
        if layout.unlabelled:
            return
        if self._options.class_level is None:
            self._check_nested(layout)
        elif self._options.splits:
            self._check_level(layout)
        self._check_above(layout)
        self._check_alike(layout)

    def _check_nested(self, layout: Layout) -> None:
        """Class folders that hold folders of images: which of the two are the classes, nobody can tell."""
        found = {path: each for path, each in layout.classes.items() if each.all_images}
        common = {tuple(each.below) for each in found.values() if not each.images}
        nested = {path: each for path, each in found.items() if _is_nested(path, each)}
        inner = len(common) == 1 and self._is_inner(nested)
        if not nested or inner:
            return
        path, each = next(iter(nested.items()))
        names = [other[-1] for other in found]
        lone = path
        while len(each.below) == 1 and not each.images:  # `part1/images/cat`
            lone = (*lone, *each.below)
            each = self._tree.inside([lone])[0]
        lone, each = (lone, each) if each.below else (path, nested[path])
        below = sorted(each.below)
        if sum(map(is_split_word, below)) > len(below) / 2:
            raise StageError(
                f"{self._tree.where}: below {lone[-1]}/ lie {some(f'{name}/' for name in below)}, which are splits by "
                f"their names, below class folders ({some(names)}). Expected SPLIT/CLASS/*: sort them so, or bring "
                f"each of {some(names)} as a batch of its own"
            )
        root = next(root for root in layout.roots if path[: len(root.path)] == root.path)
        level = 1 + len(root.path) - _split_depth(root)
        raise StageError(
            f"{self._tree.where} can be read in two ways. Either its {len(names)} folders ({some(names)}) are the "
            f"classes: add ?class_level={level}. Or those inside them are, as {lone[-1]}/ holds {len(below)} "
            f"({some(below)}): add ?class_level={level + 1 + len(lone) - len(path)}, or name one of them as the "
            f"source, or leave some out with ?leave_out=NAME,NAME"
        )

    def _is_inner(self, nested: dict[Path, Inside]) -> bool:
        """Whether folders in class folders are no classes: `cat/images/*` and `dog/images/*`, one each, of one name."""
        alone = {path: next(iter(each.below)) for path, each in nested.items() if len(each.below) == 1}
        first = [(*path, name) for path, name in alone.items()][:FEW]
        is_split = any(map(is_split_word, alone.values())) and self._options.splits
        return len(alone) == len(nested) and not is_split and not any(map(self._tree.folders, first))

    def _check_level(self, layout: Layout) -> None:
        names = {path[-1] for path in layout.classes}
        if len(names) > 1 and all(map(is_split_word, names)):
            raise StageError(
                f"{self._tree.where}: with class_level={layout.level} the classes would be {some(sorted(names))}, "
                f"which are names of splits. Name one of the folders above them as the source"
            )

    def _check_above(self, layout: Layout) -> None:
        """More images that belong to no class than such that do: the layout is another one."""
        taken = sum(each.all_images for each in layout.classes.values())
        folders = {root.path[:n] for root in layout.roots if not root.is_flat for n in range(len(root.path) + 1)}
        above = sum(self._tree.direct(path).surely for path in folders)
        if above > taken:
            raise StageError(
                f"{self._tree.where}: {above} images lie above the class folders ({some(_names(layout))}), and "
                f"{taken} in them. Sort them into class folders; or take all without labels with ?unlabelled=true"
            )

    def _check_alike(self, layout: Layout) -> None:
        """Splits that have no class in common are of two tasks."""
        of = {
            root: {path[-1] for path in layout.classes if path[: len(root.path)] == root.path}
            for root in layout.roots
            if not root.is_flat
        }
        train = next((root for root in of if root.split == "train"), None)
        for root, names in of.items():
            if train and names and not names & of[train]:
                raise StageError(
                    f"{self._tree.where}: {root.split} ({'/'.join(root.path)}/) has no class of train: its folders are "
                    f"{some(sorted(names))}, those of train {some(sorted(of[train]))}. Give them the same names, or "
                    f"leave it out with ?leave_out={root.path[-1]}"
                )


def unlabelled_splits(layout: Layout) -> list[Root]:
    """Flat splits beside others that have classes: without labels they are of no use; to drop them is a decision."""
    flat = [root for root in layout.roots if root.is_flat]
    return flat if len(flat) < len(layout.roots) and layout.asked == "false" else []


def no_labels(where: str, root: Root, images: int, tables: str) -> StageError:
    """The message for images of a split that no class folder and no table gives a label."""
    depth = _split_depth(root)
    return StageError(
        f"{where}: {'/'.join(root.path)}/ holds {images} images and no class folders, so {root.split} has no labels, "
        f"and other splits have. {tables} Or leave it out with ?leave_out={'/'.join(root.path[:depth])}: what is then "
        f"missing is drawn from train. Or take all without labels: ?unlabelled=true"
    )


def _split_depth(root: Root) -> int:
    """How many folders down its split folder is; 0 where it is no split. A folder around it may be `photos-dev`."""
    return max((n for n, name in enumerate(root.path, start=1) if split_in(name) == root.split), default=0)


def _is_nested(path: Path, each: Inside) -> bool:
    deeper = sum(each.below.values())
    if each.images:
        return len(each.below) > 1 and each.images < deeper
    return set(each.below) != {path[-1]}


def _names(layout: Layout) -> list[str]:
    return sorted({path[-1] for path in layout.classes})


def _query(names: list[str]) -> str:
    return ",".join(names[:10])


def some(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
