"""Whole files or none: an output is written beside its place, flushed to the disk and renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.runtime.command import StageError


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it is renamed to `path` on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of a full disk names no file
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory beside `path` to fill; it replaces `path` on success, and is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in [*sorted(aside.rglob("*")), aside]:
            _sync(file)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
        _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_directory(source: Path, path: Path) -> None:
    """Moves the finished folder `source` to `path` and replaces what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sync(source)
    try:
        if path.exists():
            shutil.rmtree(path)
        source.rename(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            error.filename = error.filename or str(path)
            raise
        with replaced_directory(path) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)
        shutil.rmtree(source)
    _sync(path.parent)


def check_folder(folder: Path, option: str) -> None:
    """Checks that files can be written into a folder, which may be missing yet.

    Args:
        option: of the command line that names the folder.

    Raises:
        StageError: they cannot.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise StageError(f"{option} {folder}: {there} is no folder that may be written to")


def write_text(path: Path, text: str) -> None:
    """Writes `text` as a whole file, in UTF-8."""
    with replaced_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as a whole JSON file, indented, with a newline at its end."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
