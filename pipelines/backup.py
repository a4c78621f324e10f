"""`python -m pipelines.backup FILE.tar`: MLflow's database and artifacts as one file, taken while everything runs.

`--restore FILE.tar` puts them where nothing is yet, in this checkout or another; the database names its artifacts by
absolute paths, which are made those of the new place. Code, data and models' sources are git's and DVC's to keep.
"""

import argparse
import json
import logging
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from stages.registry.client import artifact_root, is_server, tracking_uri
from stages.runtime.command import StageError, run
from stages.runtime.files import replaced_file, write_json

logger = logging.getLogger(__name__)

DATABASE, ARTIFACTS, CONTENTS = "mlflow.db", "mlartifacts", "backup.json"
"""Names in the file."""
_JOURNALS = ("-journal", "-wal", "-shm")
"""Files beside a database in which SQLite keeps what is to be undone or done yet."""
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)
"""Columns that name places of artifacts."""


def back_up(database: Path, artifacts: Path, file: Path) -> None:
    """Writes `file`, whole or not at all.

    Raises:
        StageError: there is no database, there is such a file, or it would be among what it holds.
    """
    if not database.exists():
        raise StageError(f"there is no {database} to back up; `make repro` begins one")
    if file.exists():
        raise StageError(f"{file} exists and is not overwritten; give another name")
    if file.resolve().is_relative_to(artifacts.resolve()):
        raise StageError(f"{file} lies in {artifacts} and would hold itself; put it elsewhere")
    with replaced_file(file) as aside:
        copy = aside.with_name(f"{aside.name}.db")
        try:
            _copy_database(database, copy)
            _warn_of_others(copy, artifacts)
            # The database first: whatever it names was written before it, and artifacts are added. One exception: where
            # a gate is taken again meanwhile, its gate.json and review.html are newer than the card and the tags, which
            # are what counts.
            _write_tar(aside, copy, artifacts)
        finally:
            copy.unlink(missing_ok=True)


def _copy_database(database: Path, copy: Path) -> None:
    """SQLite's own online backup: consistent whatever others write meanwhile."""
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as source, closing(sqlite3.connect(copy)) as to:
        source.backup(to)


def _warn_of_others(database: Path, artifacts: Path) -> None:
    """Artifacts in other places, a bucket or where the checkout lay before, are not in the file."""
    with closing(sqlite3.connect(database)) as db:
        places = [row[0] for row in db.execute("select artifact_uri from runs")]
    if others := [place for place in places if place and not _is_below(place, str(artifacts))]:
        logger.warning(
            "warning: the artifacts of %d runs lie elsewhere and are not in it, for example %s", len(others), others[0]
        )


def _write_tar(file: Path, database: Path, artifacts: Path) -> None:
    with tarfile.open(file, "w") as tar:
        contents = file.with_name(f"{file.name}.json")
        try:
            write_json(contents, {"artifacts": str(artifacts)})
            tar.add(contents, CONTENTS)
        finally:
            contents.unlink(missing_ok=True)
        tar.add(database, DATABASE)
        for path in sorted(artifacts.rglob("*")):
            try:
                tar.add(path, f"{ARTIFACTS}/{path.relative_to(artifacts)}", recursive=False)
            except FileNotFoundError:  # a temporary file of somebody who is writing
                logger.info("%s went away meanwhile", path)


def restore(file: Path, database: Path, artifacts: Path) -> None:
    """Puts a backup in place, whole or not at all: the database comes last.

    Raises:
        StageError: there is something already, or the file is no whole backup.
    """
    work = database.parent / ".synset/restore"
    _undo_interrupted(work, database, artifacts)
    # Journals too: SQLite would apply those of a database that was moved away to the one that takes its place.
    for path in (database, artifacts, *(database.with_name(f"{database.name}{end}") for end in _JOURNALS)):
        if path.exists() and not _is_empty(path):
            raise StageError(f"{path} exists and is not overwritten; move it away, or restore in another checkout")
    if not file.is_file():
        raise StageError(f"there is no file {file}")
    work.mkdir(parents=True)
    try:
        _unpack(file, work)
        contents = json.loads((work / CONTENTS).read_text(encoding="utf-8"))
        _rewrite(work / DATABASE, contents["artifacts"], str(artifacts))
    except (tarfile.TarError, EOFError, ValueError, KeyError, FileNotFoundError, sqlite3.Error) as error:
        shutil.rmtree(work)
        raise StageError(f"{file} is no whole backup ({error}); nothing was restored") from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if artifacts.exists():
        artifacts.rmdir()
    artifacts.parent.mkdir(parents=True, exist_ok=True)
    (work / ARTIFACTS).replace(artifacts)
    (work / DATABASE).replace(database)
    shutil.rmtree(work)


def _undo_interrupted(work: Path, database: Path, artifacts: Path) -> None:
    """Killed between its two renames, a restore has put the artifacts in place, and no database that names them."""
    if work.exists():
        if (work / DATABASE).exists() and not (work / ARTIFACTS).exists() and not database.exists():
            artifacts.replace(work / ARTIFACTS)
        shutil.rmtree(work)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _unpack(file: Path, work: Path) -> None:
    # The empty folder first: without it, a killed unpacking could be taken for a killed renaming.
    (work / ARTIFACTS).mkdir()
    if not tarfile.is_tarfile(file):  # to open one names every format that it is not
        raise ValueError("it is no tar")
    with tarfile.open(file) as tar:
        tar.extractall(work, filter="data")
        _check_end(tar)
    with closing(sqlite3.connect(work / DATABASE)) as db:
        if (said := db.execute("pragma integrity_check").fetchone()[0]) != "ok":
            raise ValueError(f"its database is damaged: {said}")
    for path in work.rglob("*"):
        _sync(path)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ValueError where a tar, read to its end, was cut off between two files: tarfile takes that for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError("it was cut off")


def _rewrite(database: Path, before: str, now: str) -> None:
    """Places of artifacts below `before` become those below `now`, in one transaction."""
    with closing(sqlite3.connect(database)) as db, db:
        for table, column in _existing(db):
            rows = db.execute(f"select rowid, {column} from {table} where {column} is not null").fetchall()
            moved = [(now + place[len(before) :], row) for row, place in rows if _is_below(place, before)]
            db.executemany(f"update {table} set {column} = ? where rowid = ?", moved)


def _existing(db: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Those of the columns that this version of MLflow has."""
    for table, column in _LOCATIONS:
        columns: list[Any] = db.execute(f"pragma table_info({table})").fetchall()
        if column in {each[1] for each in columns}:
            yield table, column


def _is_below(place: str, folder: str) -> bool:
    return place == folder or place.startswith(f"{folder}/")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def places() -> tuple[Path, Path]:
    """The local database, and the folder of its artifacts.

    Raises:
        StageError: MLflow is elsewhere.
    """
    uri = tracking_uri()
    root = artifact_root(uri) or ""
    if is_server(uri):
        raise StageError(
            f"MLFLOW_TRACKING_URI names the server {uri}, whose keeper backs up its database and artifacts. "
            f"Unset it for the mlflow.db of this checkout"
        )
    if not uri.startswith("sqlite:///") or "://" in root:
        raise StageError(f"this backs up SQLite with artifacts in a folder; here it is {uri} with {root or 'none'}")
    return Path(uri.removeprefix("sqlite:///")).absolute(), Path(root).absolute()


def main() -> None:
    """Backs up, or restores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.tar")
    parser.add_argument("--restore", action="store_true", help="put the file's content in place")
    arguments = parser.parse_args()
    database, artifacts = places()
    if arguments.restore:
        restore(arguments.file, database, artifacts)
        print(f"restored {database} and {artifacts}; `make ui` shows them")
    else:
        back_up(database, artifacts, arguments.file)
        print(
            f"backed up {database} and {artifacts} in {arguments.file} ({arguments.file.stat().st_size / 1e6:,.1f} MB)"
        )


if __name__ == "__main__":
    run(main)
