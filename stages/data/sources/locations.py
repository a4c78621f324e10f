"""Locations: files and folders that may be on this machine or anywhere that fsspec reads (s3://, gs://, https://)."""

import io
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast
from urllib.parse import unquote

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from stages.runtime.command import StageError

logger = logging.getLogger(__name__)
T = TypeVar("T")
LARGEST_FILE = 2**30
"""Bytes. No image is larger; what is larger is refused by name before it is read."""
LARGEST_TABLE = 2**28
"""Bytes of a file that is read as a whole: labels, class names."""
BLOCK = 2**22
"""Bytes asked of a remote store at a time."""
TRIES = 5
STAMPS = ("ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "Last-Modified", "updated", "created")
"""Stores' names of what changes with a file's content, the most reliable first."""


class Entry(NamedTuple):
    """What a folder holds: `size` in bytes (-1: not told), `stamp` changes with the content."""

    name: str
    is_folder: bool
    size: int = -1
    stamp: str = ""


@dataclass
class Hidden:
    """Counts the hidden files and folders that a listing leaves out (`.DS_Store`, `._1.jpg`, `.ipynb_checkpoints`)."""

    files: int = 0
    name: str = ""
    """Of the first one."""

    def add(self, name: str) -> None:
        """One more."""
        self.files, self.name = self.files + 1, self.name or name


@dataclass(frozen=True)
class Location:
    """A file or folder: an absolute path of this machine, or a URL."""

    address: str

    @classmethod
    def of(cls, text: str, incoming: Path | str) -> "Location":
        """An address as people write it; a relative one lies below `incoming`, a folder or URL itself."""
        text = text.removeprefix("file://")
        if "://" in text:
            return cls(text.rstrip("/"))
        base = str(incoming).removeprefix("file://")
        if "://" in base and not text.startswith("/"):
            return cls(f"{base.rstrip('/')}/{text}".rstrip("/"))
        return cls(str(Path(base).absolute() / text))

    @property
    def is_local(self) -> bool:
        """On this machine: an error lies in the file and not in the network."""
        return "://" not in self.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        return self.address

    def child(self, name: str) -> "Location":
        """What lies below, by its path relative to this."""
        return Location(f"{self.address.rstrip('/')}/{name}" if name else self.address)

    def parent(self) -> "Location":
        """The folder that it lies in."""
        return Location(self.address.rstrip("/").rpartition("/")[0] or "/")

    def is_folder(self) -> bool:
        """Whether there is a folder."""
        if self.is_local:
            return Path(self.address).is_dir()
        filesystem, path = self.filesystem()
        return bool(self._call(partial(filesystem.isdir, path)))

    def is_file(self) -> bool:
        """Whether there is a file."""
        if self.is_local:
            return Path(self.address).is_file()
        filesystem, path = self.filesystem()
        return bool(self._call(partial(filesystem.isfile, path)))

    def entries(self, hidden: Hidden | None = None) -> list[Entry]:
        """What the folder holds, sorted by name, hidden ones left out; of files on this machine, the names alone.

        Args:
            hidden: counts those.

        Raises:
            StageError: it cannot be read, or the name of a folder is not UTF-8 or has control characters.
        """
        found = _shown(self._local_entries() if self.is_local else self._remote_entries(), hidden)
        for entry in found:
            if entry.is_folder:
                check_name(f"{self}/{entry.name}", entry.name, "folder")
        return sorted(found)

    def files_below(self, hidden: Hidden | None = None) -> list[Entry]:
        """Every file at any depth, named relative to this, sorted; hidden ones are left out and links followed.

        Args:
            hidden: counts those; a hidden folder counts once.

        Raises:
            StageError: something cannot be read, is no file, or links back into itself; a name is not UTF-8.
        """
        found = _shown(self._local_files() if self.is_local else self._remote_files(), hidden)
        for entry in found:
            check_name(f"{self}/{entry.name}", entry.name)
            check_size(f"{self}/{entry.name}", entry.size)
        return found

    def entry(self) -> Entry:
        """The file's own name, size and stamp.

        Raises:
            StageError: there is no such file.
        """
        if self.is_local:
            return _local_entry(self.address, self.name)
        filesystem, path = self.filesystem()
        return _remote_entry(self._call(partial(filesystem.info, path)), self.name)

    def open(self, random_access: bool = False) -> IO[bytes]:
        """The file, to be read.

        Args:
            random_access: it is not read from beginning to end, which a server that sends only whole files cannot do.

        Raises:
            StageError: it cannot be read.
        """
        if not self.is_local:
            return cast(IO[bytes], RemoteFile(self, random_access))
        try:
            return Path(self.address).open("rb")
        except OSError as error:
            raise unreadable(self.address, error) from error

    def open_listed(self, size: int) -> IO[bytes]:
        """The file, of which a listing told the size: a small remote one in one request.

        Raises:
            StageError: it cannot be read.
        """
        if self.is_local or not 0 <= size <= BLOCK:
            return self.open()
        filesystem, path = self.filesystem()
        return io.BytesIO(_with_retries(self.address, partial(filesystem.cat_file, path)))

    def read(self) -> bytes:
        """All bytes of a small file.

        Raises:
            StageError: it cannot be read, or is no small file.
        """
        with self.open() as file:
            data = file.read(LARGEST_TABLE + 1)
        if len(data) > LARGEST_TABLE:
            raise StageError(f"{self} is larger than {LARGEST_TABLE} bytes; is it what its name says?")
        return data

    def lines(self) -> list[str]:
        """The lines of a text file in UTF-8.

        Raises:
            StageError: it cannot be read or is not UTF-8.
        """
        try:
            return self.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise StageError(f"{self} is not text in UTF-8 ({error.reason} at byte {error.start})") from error

    def _local_entries(self) -> list[Entry]:
        with os.scandir(self.address) as found:
            return [Entry(each.name, each.is_dir()) for each in found]

    def _local_files(self) -> Iterator[Entry]:
        seen = set()
        for root, folders, names in os.walk(self.address, followlinks=True, onerror=_refuse):
            if (real := os.path.realpath(root)) in seen:
                raise StageError(f"{root} is a link to a folder that is read already ({real}); remove the link")
            seen.add(real)
            below = os.path.relpath(root, self.address) + "/" if root != self.address else ""
            yield from (Entry(f"{below}{name}/", True) for name in folders if name.startswith("."))
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if name.startswith("."):
                    yield Entry(below + name, False)
                else:
                    yield _local_entry(os.path.join(root, name), below + name)  # noqa: PTH118 - a Path a file is slow

    def filesystem(self) -> tuple[Any, str]:
        """fsspec's file system of a remote location, and its path in it.

        Raises:
            StageError: there is no such kind of store.
        """
        logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # it tells where it found each setting
        logging.getLogger("s3fs").setLevel(logging.WARNING)
        try:
            return cast(tuple[Any, str], url_to_fs(self.address))
        except (ValueError, ImportError) as error:
            raise StageError(f"{self}: {error}") from error

    def _call(self, call: Callable[[], T]) -> T:
        """Calls a remote store; each kind of store fails in ways of its own."""
        try:
            return call()
        except Exception as error:
            raise unreadable(self.address, error) from error

    def _remote_entries(self) -> list[Entry]:
        filesystem, path = self.filesystem()
        found = self._call(partial(filesystem.ls, path, detail=True))
        own = path.strip("/")
        listed = [_remote_entry(each, _last(each["name"])) for each in found if each["name"].strip("/") != own]
        return [entry for entry in listed if entry.name]

    def _remote_files(self) -> Iterator[Entry]:
        filesystem, path = self.filesystem()
        own = path.strip("/") + "/"
        for name, info in self._call(partial(filesystem.find, path, detail=True)).items():
            below = unquote(name) if self.address.startswith("http") else name
            below = below.strip("/").removeprefix(own)
            # A name that ends in a slash is no file: the S3 console makes such an object of every new folder.
            if below and not name.endswith("/"):
                yield _remote_entry(info, below)


class RemoteFile:
    """A remote file, read forward in blocks; after a broken connection it goes on at the same byte.

    A file of a web server that sends only whole files is read as one stream: to reach a byte, all before it is read.
    """

    def __init__(self, location: Location, random_access: bool) -> None:
        self._location, self._random_access, self._position, self.closed = location, random_access, 0, False
        self._file: Any = None
        self._in_parts = True
        self._tried(self._opened)

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer only at the end.

        Raises:
            StageError: the connection broke again and again.
        """
        chunks = []
        while size and (data := self._tried(partial(self._some, size))):
            chunks.append(data)
            self._position += len(data)
            size -= len(data) if size > 0 else 0
        return b"".join(chunks)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += self.size()
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        """Of the whole file, in bytes; 0 where the server does not tell."""
        return int(getattr(self._tried(self._opened), "size", 0) or 0)

    def seekable(self) -> bool:
        """Whether the server sends parts of files, as far as is known."""
        return self._in_parts and self.size() > 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self.closed = None, True

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _some(self, size: int) -> bytes:
        return cast(bytes, self._opened().read(size))

    def _opened(self) -> Any:
        if self._file is None or (not self._in_parts and self._file.tell() > self._position):
            filesystem, path = self._location.filesystem()
            block = BLOCK if self._in_parts else 0
            self._file = filesystem.open(path, "rb", block_size=block, cache_type="readahead")
        if self._in_parts and self._file.tell() != self._position:
            self._file.seek(self._position)
        while self._file.tell() < self._position:
            if not self._file.read(min(BLOCK, self._position - self._file.tell())):
                raise EOFError(f"it ends before byte {self._position}")
        return self._file

    def _tried(self, call: Callable[[], T]) -> T:
        return _with_retries(str(self._location), call, self._failed)

    def _failed(self, error: Exception) -> bool:
        """Whether to try again at once."""
        self._file = None
        if "range requests" not in str(error) or not self._in_parts:  # fsspec's words for such a server
            return False
        if self._random_access:
            raise StageError(f"{self._location}: this server sends whole files only; download it") from error
        self._in_parts = False
        return True


def _with_retries(where: str, call: Callable[[], T], failed: Callable[[Exception], bool] = lambda _: False) -> T:
    """Calls a remote store; retries with growing pauses where the connection breaks."""
    for attempt in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, PermissionError) as error:
            raise unreadable(where, error) from error
        except Exception as error:
            if failed(error) and attempt < TRIES - 1:
                continue
            if attempt == TRIES - 1:
                raise broken(where, error) from error
            logger.info("%s: %s; trying again", where, first_line(error))
            time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")


def check_name(where: str, name: str, what: str = "file") -> None:
    """Refuses a name that cannot be shown or stored.

    Raises:
        StageError: it is not UTF-8, has control characters, or is longer than any file system has them.
    """
    if not name.isprintable():
        raise StageError(
            f"{os.fsencode(where)!r}: the name is not UTF-8, or has control characters or odd spaces; rename the {what}"
        )
    if len(name.encode()) > 4096:
        raise StageError(f"{where[:200]}...: the name has {len(name)} characters; rename the {what}")


def check_size(where: str, size: int, largest: int = LARGEST_FILE) -> None:
    """Refuses a file that is no image by its size.

    Raises:
        StageError: it has more than `largest` bytes.
    """
    if size > largest:
        raise StageError(
            f"{where} has {size / 2**30:.1f} GiB, and none may have more than {largest / 2**30:.0f}; remove it"
        )


def unreadable(where: str, error: BaseException) -> StageError:
    """The message for what cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return StageError(f"{where} cannot be read: {reason}")


def broken(where: str, error: BaseException) -> StageError:
    """The message for a connection that broke."""
    return StageError(
        f"{where}: the connection broke ({first_line(error)}). Run the same command again: it goes on with what it has"
    )


def first_line(error: BaseException) -> str:
    """What an error of other people's code says, fit for a message: it may quote bytes of a damaged file."""
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    return "".join(each if each.isprintable() else "?" for each in line)


def _shown(entries: Iterable[Entry], hidden: Hidden | None) -> list[Entry]:
    """Sorted, without the hidden ones, which are counted."""
    found: list[Entry] = []
    left_out: list[Entry] = []
    for entry in entries:
        is_hidden = entry.name.startswith(".") or "/." in entry.name
        (left_out if is_hidden else found).append(entry)
    for entry in sorted(left_out):
        if hidden is not None:
            hidden.add(entry.name)
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise unreadable(str(error.filename), error)


def _local_entry(path: str, name: str) -> Entry:
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path a file is slow
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise StageError(f"{path} is no plain file but a device, a pipe or a socket; remove it")
    return Entry(name, False, found.st_size, str(found.st_mtime_ns))


def _remote_entry(info: dict[str, Any], name: str) -> Entry:
    stamp = next((f"{key}={info[key]}" for key in STAMPS if info.get(key)), "")
    size = info.get("size")
    return Entry(name, info.get("type") == "directory", -1 if size is None else int(size), stamp)


def _last(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2]
    return unquote(name) if path.startswith("http") else name
