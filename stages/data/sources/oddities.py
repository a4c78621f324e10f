"""What looks odd in the classes and splits of a source: one sentence each, for a person to say yes or no to.

Nothing here stops anything. Each check is of names and counts alone, so that it costs nothing at a million images.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stages.data.sources.parts import split_in

FEW = 10
"""Images. A class of fewer has one or two to be tested on."""
MOST_ODD = 0.05
"""Share of the files that are taken."""
SHOWN = 3
"""Names in one sentence."""
FOLDER_WORDS = frozenset(
    ("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "jpegimages", "data", "dataset")
) | {"label", "labels", "annotation", "annotations", "mask", "masks", "__macosx", "lost+found", "@eadir"}
"""What folders are called that hold a data set, or what a machine put beside one."""
NO_LABEL_WORDS = frozenset(
    ("nan", "none", "null", "n/a", "na", "unknown", "unlabelled", "unlabeled", "nolabel", "?", "-")
)
ANNOTATIONS = re.compile(r"annot(ation)?s?$|ground.?truth|^imagesets$|^segmentation(class|object)$", re.IGNORECASE)
FILE = re.compile(r"\.(jpe?g|png|webp|bmp|tiff?|zip|tar)$", re.IGNORECASE)
COPY = re.compile(r" ?- ?copy| ?\(\d+\)$|^copy of ", re.IGNORECASE)


def odd_classes(names: list[str]) -> Iterator[str]:
    """Of the names of classes, in their order."""
    if len(names) == 1:
        yield f"there is one class only, {names[0]}: nothing can be told apart"
    for what, is_odd in NAME_CHECKS:
        if odd := list(filter(is_odd, names)):
            yield f"{what}: {some(odd)}"
    if (numbers := list(filter(str.isdecimal, names))) and (words := [name for name in names if not name.isdecimal()]):
        yield f"some names of classes are numbers ({some(numbers)}) and others are not ({some(words)})"
    yield from _odd_numbers(names)
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_plain(name), []).append(name)
    for name in names:  # a file manager's copy stands beside its original
        if (original := _plain(COPY.sub("", name))) != _plain(name) and original in alike:
            alike[original].append(name)
    if pairs := [" and ".join(map(repr, same)) for same in alike.values() if len(same) > 1]:
        yield f"names of classes differ only in case, blanks or signs: {some(pairs)}"


def odd_counts(counts: dict[str, dict[str, int]], names: list[str], few_asked: bool = False) -> Iterator[str]:
    """Of the images of a source.

    Args:
        counts: of images by split and class, the class empty where one has none.
        names: of the classes, in their order.
        few_asked: the query asks for few images of each.
    """
    splits = sorted(counts.keys() - {"all"}, key=("train", "val", "test").index)
    if splits and "train" not in splits:
        yield f"there is no train split (found: {', '.join(splits)})"
    for split, of_split in counts.items():
        without, images = of_split.get("", 0), sum(of_split.values())
        if names and without:
            yield f"{split}: {without:,} of {images:,} images have no label (`?unlabelled=skip` leaves them out)"
        if names and without < images and (missing := [name for name in names if name not in of_split]):
            yield f"{split} has no image of {len(missing):,} of {len(names):,} classes: {some(missing)}"
    if few_asked:
        return
    totals = {name: sum(of_split.get(name, 0) for of_split in counts.values()) for name in names}
    if small := sorted((name for name in names if totals[name] < FEW), key=lambda name: totals[name]):
        fewest = [f"{name} ({totals[name]})" for name in small]
        yield f"{len(small):,} of {len(names):,} classes have fewer than {FEW} images: {some(fewest)}"
    if len(names) >= FEW and max(totals.values()) == 1:
        yield "every class has one image only: the labels may be captions, or names of files"


def odd_groups(groups: dict[str, Any]) -> Iterator[str]:
    """Of how many groups there are, and how many images in them; empty where nobody asked for groups."""
    if groups and not groups["images"]:
        yield f"no image is in a group by {groups['by']}"
    elif groups and groups["largest"] == 1:
        yield f"every group has one image by {groups['by']}: nothing is kept together"


def odd_folders(folders: dict[str, list[str]], classes: int) -> Iterator[str]:
    """Of the classes whose images all lie in folders below the class folder, and of these folders' names."""
    if deep := sorted(name for name, below in folders.items() if len(below) > 1):
        below = some([f"{folder}/" for folder in folders[deep[0]]])
        yield (
            f"{len(deep):,} of {classes:,} class folders hold only folders, as {deep[0]}/ with {below}: if those are "
            f"the classes, the source is one folder too high"
        )


def odd_files(left_out: int, taken: int, no_images: int) -> Iterator[str]:
    """Of how many files are left out or taken, and of those taken, how many are no images by their names."""
    if left_out > MOST_ODD * taken:
        yield f"{left_out:,} of {left_out + taken:,} files are left out"
    if no_images > MOST_ODD * taken:
        yield f"{no_images:,} of {taken:,} files are no images by their names"


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = [name if name == name.strip() else repr(name) for name in names]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _odd_numbers(names: list[str]) -> Iterator[str]:
    """Of classes whose names are all whole numbers, in the order of their values."""
    if not names or not all(map(str.isdecimal, names)):
        return
    moved = next(((name, number) for number, name in enumerate(names) if int(name) != number), None)
    ids = f"but class {moved[0]} has class_id {moved[1]}" if moved else "and each is its class_id"
    yield f"names of classes are numbers, counted by their value ({some(names)}), {ids}"


def _plain(name: str) -> str:
    if not any(map(str.isalpha, name)):  # 1.0 is not 10
        return name
    return re.sub(r"[\s_.\-]+", "", unicodedata.normalize("NFKC", name).casefold())


def _is_split(name: str) -> bool:
    return split_in(name) is not None and len(re.findall(r"[^\W\d_]+", name)) == 1


NAME_CHECKS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("names of classes look like splits", _is_split),
    (
        "names of classes look like folders of a data set",
        lambda name: name.lower() in FOLDER_WORDS or bool(ANNOTATIONS.search(name)),
    ),
    ("names of classes look like a missing label", lambda name: name.lower() in NO_LABEL_WORDS),
    ("names of classes look like JSON", lambda name: name.startswith(("{", "["))),
    ("names of classes are numbers with a point", lambda name: bool(re.fullmatch(r"-?\d+\.\d+", name))),
    ("names of classes begin or end with a blank or a point", lambda name: name != name.strip(" .")),
    (
        "names of classes look like files",
        lambda name: bool(FILE.search(name)),
    ),
)
