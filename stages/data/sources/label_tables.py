"""Tables that tell the class of each file of a folder, as ImageNet's val and many others have one beside the images."""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import cast

from scipy.io import loadmat

from stages.data.sources.locations import LARGEST_TABLE, Entry, Location
from stages.data.sources.parts import check_class
from stages.data.sources.tars import Readable, decompressed, members
from stages.runtime.command import StageError

LABELS = "LOC_val_solution.csv"
ANNOTATIONS = "val_annotations.txt"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
DEVKIT_FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
TABLES = (".csv", ".tsv", ".txt")
LARGEST_OTHER = 2**26
"""Bytes of a table of unknown name."""


def labels_beside(
    folders: Iterable[Location], files: set[str], classes: set[str]
) -> tuple[dict[str, str], Location] | None:
    """File name -> class, for files of one folder, from the first table beside them that names them; and that table.

    Args:
        folders: where it may be, the nearest first.
        files: base names of the images.
        classes: that the other splits have. A table of unknown name must name all files, and only these classes.

    Raises:
        StageError: a table of a known name is wrong.
    """
    for folder in folders:
        entries = folder.entries()
        for table in _tables(folder, entries):
            labels = _read(table, files, classes)
            if labels.keys() & files:
                return labels, table
    return None


def tables_in(folders: Iterable[Location]) -> list[str]:
    """Names of files that may be tables of labels, for messages."""
    return sorted({entry.name for folder in folders for entry in folder.entries() if _may_be_table(entry)})


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


def annotations(table: Location) -> dict[str, str]:
    """File name -> wnid, of a val_annotations.txt as Tiny ImageNet has it.

    Raises:
        StageError: it is something else.
    """
    labels: dict[str, str] = {}
    for number, line in enumerate(table.lines(), start=1):
        name, tab, rest = line.partition("\t")
        class_name = rest.split("\t")[0]
        if not tab or not class_name:
            raise StageError(f"{table}, line {number}: expected a file name, a tab and a wnid, found {line!r}")
        if name in labels:
            raise StageError(f"{table}, line {number}: {name} is in it twice")
        labels[name] = class_name
    return labels


def devkit_labels(devkit: Location) -> dict[str, str]:
    """File name -> wnid, of ImageNet's devkit, packed or unpacked: meta.mat tells the wnid of each number.

    Raises:
        StageError: it is something else.
    """
    wanted = dict.fromkeys(DEVKIT_FILES, b"")
    if devkit.is_folder():
        for name in DEVKIT_FILES:
            if (file := devkit.child(f"data/{name}")).is_file():
                wanted[name] = file.read()
    else:
        with devkit.open() as packed:
            for member in members(decompressed(cast(Readable, packed), str(devkit)), str(devkit)):
                if member.path[-1] in wanted and member.size <= LARGEST_TABLE:
                    wanted[member.path[-1]] = member.data.read()
    if missing := sorted(name for name, data in wanted.items() if not data):
        raise StageError(f"{devkit} has no {' and no '.join(missing)}; is this the devkit of tasks 1 and 2?")
    meta, table = wanted.values()
    wnids = _wnids(meta, str(devkit))
    try:
        return {
            f"ILSVRC2012_val_{number:08d}.JPEG": wnids[int(line)]
            for number, line in enumerate(table.decode("ascii").split(), start=1)
        }
    except (ValueError, KeyError) as error:
        raise StageError(f"{devkit}: a line of the ground truth is no ILSVRC2012_ID of meta.mat ({error})") from error


def _tables(folder: Location, entries: list[Entry]) -> Iterator[Location]:
    names = [entry.name for entry in entries]
    known = [name for name in names if name in (LABELS, ANNOTATIONS) or name.startswith("ILSVRC2012_devkit_t12")]
    others = [entry.name for entry in entries if _may_be_table(entry) and entry.name not in known]
    yield from (folder.child(name) for name in (*known, *others))


def _may_be_table(entry: Entry) -> bool:
    lower = entry.name.lower()
    return not entry.is_folder and lower.endswith(TABLES) and not lower.startswith(("readme", "license"))


def _read(table: Location, files: set[str], classes: set[str]) -> dict[str, str]:
    """The labels of a table; of an unknown one none, where it does not fit all files."""
    if table.name == LABELS:
        return kaggle_labels(table)
    if table.name == ANNOTATIONS:
        return annotations(table)
    if table.name.startswith("ILSVRC2012_devkit_t12"):
        return devkit_labels(table)
    if table.entry().size > LARGEST_OTHER:
        return {}
    stems = {name.rpartition(".")[0]: name for name in files}
    labels: dict[str, str] = {}
    try:
        lines = table.lines()
    except StageError:  # no text: no table
        return {}
    for line in lines:
        cells = [cell.strip().strip('"') for cell in re.split(r"[,;\t]|\s+(?=\S+$)", line)]
        base = cells[0].replace("\\", "/").rpartition("/")[2]
        name = base if base in files else stems.get(base)
        if name is None or len(cells) < 2:
            continue
        if cells[1] not in classes or labels.get(name, cells[1]) != cells[1]:
            return {}
        labels[name] = cells[1]
    return labels if labels.keys() == files else {}


def _wnids(meta: bytes, where: str) -> dict[int, str]:
    """ILSVRC2012_ID -> WNID."""
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {
            int(number): check_class(str(wnid), where)
            for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
    except (ValueError, KeyError, TypeError, IndexError, NotImplementedError, OSError) as error:
        raise StageError(f"{where}: meta.mat has no synsets with ILSVRC2012_ID and WNID ({error})") from error
