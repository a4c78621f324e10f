"""Writes raw tars: the original bytes of a source's parts, deterministically; a run goes on where another was killed.

Each part has a folder while it is written, `parts/NNNNN/`. A whole tar in it is never written again, and `done.json`
says that the part is whole. In the end all tars are linked under their names in a batch's folder:

    parts/NNNNN/class.tar                    -> <split>/<class>.tar
    parts/NNNNN/<split>-CCCCC.tar            -> <split>-NNNNN.tar, numbered by part, then cut
    parts/NNNNN/unlabelled-<split>-CCCCC.tar -> unlabelled/<split>-NNNNN.tar
"""

import errno
import json
import logging
import os
import shutil
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from stages.data.raw.tars import GROUP, UNLABELLED
from stages.data.sources.account import Seen
from stages.data.sources.dispatch import Source
from stages.data.sources.locations import unreadable
from stages.data.sources.parts import Image
from stages.data.sources.tars import ChangedError
from stages.runtime.command import StageError
from stages.runtime.files import replaced_file, write_json
from stages.runtime.progress import SECONDS_BETWEEN_LINES

logger = logging.getLogger(__name__)
CUT_IMAGES, CUT_BYTES = 1_000, 2**30
"""A mixed tar is full at either limit."""
BUFFER = 2**20
DONE = "done.json"
CLASS_TAR = "class.tar"


class StoppedError(Exception):
    """Another part failed, so this one stops."""


class Made(NamedTuple):
    """What was written of a part: its tars by file name with their sizes in bytes, and what was in it."""

    tars: dict[str, int]
    images: int
    size: int
    whole_class: tuple[str, str] | None
    seen: Seen


@dataclass
class Tally:
    """Counts the images of all parts together; `stop` ends them at their next image."""

    images: int = 0
    size: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Called before each image.

        Raises:
            StoppedError: another part failed.
        """
        if self.stop.is_set():
            raise StoppedError

    def add(self, images: int, size: int) -> None:
        """Counts images and their bytes."""
        with self.lock:
            self.images += images
            self.size += size


def write_parts(source: Source, work: Path, workers: int, tally: Tally) -> Iterator[tuple[int, Made]]:
    """Writes the tars of every part below `work/parts/`, several parts at a time; whole ones are not written again.

    Yields:
        The number of a part and what was written of it, in the order in which they end.

    Raises:
        StageError: a part cannot be read; what is whole stays.
    """
    with ThreadPoolExecutor(workers) as pool:
        numbers = iter(range(len(source.parts)))
        pending: dict[Future[Made], int] = {}
        try:
            while True:
                # A few at a time: the list of what waits must not grow with the source.
                while len(pending) < 2 * workers and (number := next(numbers, None)) is not None:
                    pending[pool.submit(_write_part, source, number, work, tally)] = number
                if not pending:
                    return
                for ended in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(ended), ended.result()
        except BaseException:
            tally.stop.set()
            raise


def assemble(made: Iterable[Made], work: Path, folder: Path) -> int:
    """Links all tars under their names in `folder`, mixed ones numbered by part and cut; copies if it cannot link.

    Returns:
        How many there are.
    """
    numbers: Counter[str] = Counter()
    for part, each in enumerate(made):
        for name in each.tars:
            target = folder / _final_name(name, each, numbers)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(_part_folder(work, part) / name, target)
    return sum(numbers.values())


@contextmanager
def shown(tally: Tally, what: str) -> Iterator[None]:
    """Shows progress in the meantime: in a terminal every second, in a log every half a minute."""
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(tally, what, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(tally: Tally, what: str, ended: threading.Event) -> None:
    terminal = sys.stderr.isatty()
    while not ended.wait(1 if terminal else SECONDS_BETWEEN_LINES):
        line = f"{what}: {tally.images:,} images, {tally.size / 1e9:.2f} GB"
        if terminal:
            print(f"\r{line} ", end="", file=sys.stderr, flush=True)
        else:
            logger.info("%s", line)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _final_name(name: str, of: Made, numbers: Counter[str]) -> str:
    kind = name.rpartition("-")[0]
    number = numbers[kind]
    numbers[kind] += 1
    if of.whole_class:
        return f"{of.whole_class[0]}/{of.whole_class[1]}.tar"
    split = kind.removeprefix(f"{UNLABELLED}-")
    return f"{split}-{number:05d}.tar" if split == kind else f"{UNLABELLED}/{split}-{number:05d}.tar"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def _part_folder(work: Path, number: int) -> Path:
    return work / "parts" / f"{number:05d}"


def _write_part(source: Source, number: int, work: Path, tally: Tally) -> Made:
    part, folder = source.parts[number], _part_folder(work, number)
    if (made := _made_before(folder)) is not None:
        tally.add(made.images, made.size)
        return made
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*"):
        left.unlink()
    whole_class, seen = source.whole_class(part), Seen()
    with _Cutter(folder, whole_class) as cutter:
        for item in part.images():
            tally.check()
            taken = source.choice.takes(item)
            seen.see(item, taken)
            if isinstance(item, Image) and taken:
                seen.see_group(item.name, source.group_of(item))
                cutter.add(source.as_taken(item))
                tally.add(1, item.size)
    tars = {name: (folder / name).stat().st_size for name in sorted(cutter.tars)}
    made = Made(tars, cutter.images, cutter.size, whole_class, seen)
    write_json(folder / DONE, made._asdict() | {"seen": vars(seen)})
    return made


def _made_before(folder: Path) -> Made | None:
    """What an earlier run wrote of a part; None if it did not finish it."""
    path = folder / DONE
    if not path.is_file():
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a disk that lost it
        return None
    stored["whole_class"] = tuple(stored["whole_class"]) if stored["whole_class"] else None
    made = Made(**stored | {"seen": Seen.of(stored["seen"])})
    sizes = {name: (folder / name).stat().st_size for name in made.tars if (folder / name).is_file()}
    return made if sizes == made.tars else None


class _Cutter:
    """Writes the images of one part into tars of limited size by split, or into one tar if they are a whole class."""

    def __init__(self, folder: Path, whole_class: tuple[str, str] | None) -> None:
        self._folder, self._whole_class = folder, whole_class
        self._open: dict[str, _Cut] = {}
        self._cuts: Counter[str] = Counter()
        self.tars: list[str] = []
        self.images = self.size = 0

    def __enter__(self) -> "_Cutter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._open:
                self._open.popitem()[1].end()
        finally:
            for cut in self._open.values():
                cut.drop()

    def add(self, image: Image) -> None:
        """Writes one image into the open tar of its kind."""
        kind = CLASS_TAR if self._whole_class else image.split if image.class_name else f"{UNLABELLED}-{image.split}"
        cut = self._open.get(kind) or self._begun(kind)
        cut.add(image.name if self._whole_class or not image.class_name else f"{image.class_name}/{image.name}", image)
        self.images, self.size = self.images + 1, self.size + image.size
        if not self._whole_class and (cut.images >= CUT_IMAGES or cut.size >= CUT_BYTES):
            self._open.pop(kind).end()

    def _begun(self, kind: str) -> "_Cut":
        name = kind if kind == CLASS_TAR else f"{kind}-{self._cuts[kind]:05d}.tar"
        self._cuts[kind] += 1
        self._open[kind] = _Cut(self._folder / name)
        self.tars.append(name)
        return self._open[kind]


class _Cut:
    """One tar: written aside and renamed; or, if an earlier run wrote it, compared with what the source gives now."""

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_name(f".{path.name}.part")
        self._there = path.is_file()
        self._file: IO[bytes] = path.open("rb", BUFFER) if self._there else self._aside.open("wb", BUFFER)
        self._tar = _tar(cast(IO[bytes], _Compared(self._file, path)) if self._there else self._file)
        self.images = self.size = 0

    def add(self, name: str, image: Image) -> None:
        """Puts one image in."""
        _add(self._tar, name, image)
        self.images, self.size = self.images + 1, self.size + image.size

    def end(self) -> None:
        """The tar is whole."""
        try:
            self._tar.close()
            rest = self._file.read(1) if self._there else b""
            self._file.close()
            if rest:
                raise _changed(self._path)
            if not self._there:
                with replaced_file(self._path) as aside:
                    self._aside.rename(aside)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Gives the unfinished tar up; nothing of it is kept."""
        if not self._there:
            self._aside.unlink(missing_ok=True)
        # What is buffered goes to a removed file, and may not fit on the disk.
        with suppress(OSError):
            self._file.close()


class _Compared:
    """A file to write to: compares what is written with the bytes of a tar that exists."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path

    def tell(self) -> int:
        """For tarfile, which asks once."""
        return 0

    def write(self, data: bytes) -> int:
        """Compares."""
        if self._file.read(len(data)) != data:
            raise _changed(self._path)
        return len(data)


class _Whole:
    """The bytes of an image; it is an error if they are not as many as its size says."""

    def __init__(self, image: Image) -> None:
        self._image = image

    def read(self, size: int) -> bytes:
        """`size` bytes."""
        chunks = []
        while size > 0:
            try:
                data = self._image.data.read(size)
            except OSError as error:
                raise unreadable(_where(self._image), error) from error
            if not data:
                raise _resized(self._image)
            chunks.append(data)
            size -= len(data)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _changed(tar: Path) -> ChangedError:
    return ChangedError(
        f"the source does not give the same images as before it was interrupted ({tar.name} differs). What was made of "
        f"it is removed; run again to begin anew"
    )


def _resized(image: Image) -> StageError:
    return StageError(
        f"{_where(image)} has not the {image.size} bytes that its source told; run again when nothing changes it"
    )


def _where(image: Image) -> str:
    return f"{image.split}/{image.class_name}/{image.name}"


def _tar(file: IO[bytes]) -> tarfile.TarFile:
    """A tar that can only be written."""
    return tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, copybufsize=BUFFER)


def _add(tar: tarfile.TarFile, name: str, image: Image) -> None:
    info = tarfile.TarInfo(name)
    info.size = image.size
    info.pax_headers = {GROUP: image.group} if image.group else {}
    tar.addfile(info, cast(IO[bytes], _Whole(image)))
    tar.members.clear()  # type: ignore[attr-defined]  # or it would remember all, a kilobyte each
    if image.data.read(1):
        raise _resized(image)
