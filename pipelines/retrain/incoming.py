"""Where deliveries arrive: a folder of this machine, or one in a store that fsspec reads (s3://, gs://, ...).

Both tell names, whether a delivery is complete, and a listing that changes with its content. Nothing is kept between
two calls, because deliveries change while they are copied.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from stages.runtime.command import StageError

READY = "_READY"
T = TypeVar("T")
_STAMPS = ("ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "last_modified", "updated", "created")
"""Stores' names of what changes with a file's content."""


class UnreachableError(StageError):
    """The store does not answer, or not to us: nothing is known of any delivery."""


@dataclass(frozen=True)
class LocalIncoming:
    """A folder of this machine."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self.folder.is_dir()

    def names(self) -> list[str]:
        """The folders in it, sorted, hidden ones left out; none where there is no such folder."""
        if not self.exists():
            return []
        return sorted(each.name for each in self.folder.iterdir() if each.is_dir() and not each.name.startswith("."))

    def is_ready(self, name: str) -> bool:
        """Whether the delivery holds the mark."""
        return (self.folder / name / READY).is_file()

    def listing(self, name: str) -> str:
        """sha256 over the listing of a delivery.

        Raises:
            StageError: a file cannot be read, or a link leads back into the delivery.
        """
        return listing(self.folder / name)


@dataclass(frozen=True)
class RemoteIncoming:
    """A folder of a store, by its URL."""

    url: str

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """True: a store knows folders only by what lies in them."""
        return True

    def names(self) -> list[str]:
        """The folders in it, sorted, hidden ones left out.

        Raises:
            UnreachableError: the store or the bucket cannot be listed.
        """
        filesystem, path = self._filesystem()
        try:
            found = self._call(partial(filesystem.ls, path, detail=True))
        except PermissionError as error:
            raise UnreachableError(f"{self.url} cannot be listed: {_words(error)}; look at the credentials") from error
        except FileNotFoundError:
            self._check_bucket(filesystem, path)
            return []
        own = path.strip("/")
        folders = (each["name"].strip("/") for each in found if each["type"] == "directory")
        names = {each.rpartition("/")[2] for each in folders if each != own}
        return sorted(name for name in names if not name.startswith("."))

    def is_ready(self, name: str) -> bool:
        """Whether the delivery holds the mark."""
        filesystem, path = self._filesystem()
        return bool(self._call(partial(filesystem.isfile, f"{path.rstrip('/')}/{name}/{READY}")))

    def listing(self, name: str) -> str:
        """sha256 over the listing of a delivery, with the store's own stamps."""
        filesystem, path = self._filesystem()
        own = f"{path.strip('/')}/{name}/"
        found = self._call(partial(filesystem.find, f"{path.rstrip('/')}/{name}", detail=True))
        files = ((key.strip("/").removeprefix(own), each) for key, each in found.items() if not key.endswith("/"))
        return _digest((file, each.get("size"), _stamp(each)) for file, each in files if _counts(file))

    def _filesystem(self) -> tuple[Any, str]:
        """fsspec's file system, with nothing remembered of earlier calls, and the path in it."""
        for talker in ("aiobotocore", "s3fs"):
            logging.getLogger(talker).setLevel(logging.WARNING)  # they tell where they found each setting
        try:
            filesystem, path = url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UnreachableError(f"SYNSET_INCOMING is {self.url}: {_words(error)}") from error
        filesystem.invalidate_cache()
        return filesystem, cast(str, path)

    def _check_bucket(self, filesystem: Any, path: str) -> None:
        """Raises UnreachableError where there is no bucket: a folder with nothing in it does not exist for a store."""
        bucket = path.lstrip("/").partition("/")[0]
        try:
            self._call(partial(filesystem.ls, bucket))
        except FileNotFoundError as error:
            raise UnreachableError(f"SYNSET_INCOMING is {self.url}, and there is no `{bucket}`") from error
        except PermissionError:
            return  # our credentials are for the folder only

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each kind of store fails in ways of its own
            raise UnreachableError(f"{self.url} cannot be reached: {_words(error)}") from error


Incoming = LocalIncoming | RemoteIncoming


def incoming_at(address: Path | str, root: Path = Path()) -> Incoming:
    """The folder or URL of deliveries; a relative folder lies in `root`."""
    text = str(address).removeprefix("file://")
    return RemoteIncoming(text.rstrip("/")) if "://" in text else LocalIncoming(root / text)


def listing(folder: Path) -> str:
    """sha256 over names, sizes and times of all files of a delivery; hidden ones and the mark `_READY` do not count."""
    return _digest(_files(folder))


def _digest(files: Iterable[tuple[str, object, object]]) -> str:
    lines = sorted(f"{name}\0{size}\0{stamp}\n" for name, size, stamp in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _counts(file: str) -> bool:
    return bool(file) and file != READY and not any(part.startswith(".") for part in file.split("/"))


def _stamp(entry: dict[str, Any]) -> str:
    return next((f"{key}={entry[key]}" for key in _STAMPS if entry.get(key)), "")


def _words(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of each file, in any order."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        if (real := os.path.realpath(root)) in seen:
            raise StageError(f"{root} is a link to a folder that is read already; remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if name.startswith(".") or path == folder / READY:
                continue
            try:
                facts = path.stat()
            except OSError as error:
                raise StageError(f"{path} cannot be read: {error.strerror}") from None
            yield path.relative_to(folder).as_posix(), facts.st_size, facts.st_mtime_ns


def _refuse(error: OSError) -> None:
    raise StageError(f"{error.filename} cannot be read: {error.strerror}")
