"""Mutated real images and raw tars for scan: `python -m tests.data.fuzz_scanning --images DIR --count 200000`.

Every input follows from the seed and its number alone. A crash, a hang, an exception, a row that is no row of facts,
and memory that grows are told, with the number, and end in exit code 1; `--first N --count 1` is that input again.
"""

import argparse
import ctypes
import io
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from stages.data.parallel.crash_safe_pool import Death, Report, run_tasks
from stages.data.raw.facts import FACTS
from stages.data.raw.tars import members
from stages.data.scanning import image_facts
from stages.runtime.command import StageError
from stages.runtime.progress import worker_count

SIDE = 72
PIECE = 1000
TARS = 10
"""Every tenth input is a tar."""
SECONDS = 120
"""After which an input counts as a hang; the slowest takes some tenths of a second."""
GROWTH = 32
"""In MiB."""
M_MMAP_THRESHOLD = -3
INTERESTING = [0, 1, 2, 7, 8, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]

OF_AN_IMAGE = pa.schema([FACTS.field(name) for name in image_facts(b"")])

Mutation = Callable[[np.random.Generator, bytearray, bytes], None]


class Range(NamedTuple):
    """Inputs from `first` on."""

    first: int
    number: int


class Tried(NamedTuple):
    """What came of a range."""

    outcomes: Counter[str]
    failures: list[str]
    process: int
    memory: int  # resident, in bytes, at its end


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def kinds(image: Image.Image, other: Image.Image) -> Iterator[bytes]:
    """An RGB image as files of all formats that scan knows, in several kinds each."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "made for a test"
    grey, pair = image.convert("L"), {"save_all": True, "append_images": [other]}
    yield encoded(image, "JPEG", quality=85)
    yield encoded(image, "JPEG", progressive=True)
    yield encoded(image, "JPEG", exif=exif, comment=b"a comment", subsampling="4:4:4")
    yield encoded(image, "JPEG", restart_marker_blocks=2, optimize=True, icc_profile=bytes(range(200)))
    yield encoded(image.convert("CMYK"), "JPEG")
    yield encoded(grey, "JPEG", progressive=True)
    yield encoded(image, "MPO", **pair)
    yield encoded(image, "PNG", exif=exif)
    yield encoded(image.quantize(16), "PNG", transparency=3)
    yield encoded(image.convert("RGBA"), "PNG", **pair)
    yield encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")
    yield encoded(image, "WEBP", quality=70, exif=exif)
    yield encoded(image.convert("RGBA"), "WEBP", lossless=True)
    yield encoded(image, "WEBP", **pair)
    yield encoded(image, "BMP")
    yield encoded(image.quantize(16), "BMP")
    yield encoded(image, "GIF", **pair)
    for compression in ("raw", "tiff_deflate", "tiff_lzw", "jpeg", "packbits"):
        yield encoded(image, "TIFF", compression=compression, exif=exif)
    # Copies: an image that has been written as a JPEG remembers settings that the TIFF writer takes for its own.
    yield encoded(image.convert("L"), "TIFF", save_all=True, append_images=[other.copy()])
    yield encoded(image.convert("1"), "TIFF", compression="group4")


def seeds_of(images: list[Image.Image]) -> list[bytes]:
    """Files to mutate."""
    small = [ImageOps.contain(image.convert("RGB"), (SIDE, SIDE)) for image in images]
    # The pictures of a file have one size.
    pairs = [(image, small[number - 1].resize(image.size)) for number, image in enumerate(small)]
    return [data for image, other in pairs for data in kinds(image, other)]


def tar_of(files: list[bytes], mixed: bool) -> bytes:
    """A raw tar, with names of every kind."""
    names = ["a.JPEG", "b" * 90, "ü.JPEG", "c" * 300, "d e.JPEG"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in zip(names, files, strict=False):
            info = tarfile.TarInfo(f"n01/{name}" if mixed else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _flip(rng: np.random.Generator, data: bytearray, _: bytes) -> None:
    for at in rng.integers(len(data), size=rng.integers(1, 9)):
        data[at] ^= 1 << int(rng.integers(8))


def _overwrite(rng: np.random.Generator, data: bytearray, _: bytes) -> None:
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 17))
    data[at : at + size] = rng.bytes(size)


def _cut(rng: np.random.Generator, data: bytearray, _: bytes) -> None:
    del data[int(rng.integers(len(data))) :]


def _remove(rng: np.random.Generator, data: bytearray, _: bytes) -> None:
    at = int(rng.integers(len(data)))
    del data[at : at + int(rng.integers(1, 65))]


def _repeat(rng: np.random.Generator, data: bytearray, _: bytes) -> None:
    at = int(rng.integers(len(data)))
    data[at:at] = data[at : at + int(rng.integers(1, 513))] * int(rng.integers(1, 9))


def _splice(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    at, size = int(rng.integers(len(other))), int(rng.integers(1, 1025))
    where = int(rng.integers(len(data)))
    data[where : where + size * int(rng.integers(2))] = other[at : at + size]


def _marker(rng: np.random.Generator, data: bytearray, _: bytes) -> None:
    at = int(rng.integers(len(data)))
    data[at:at] = bytes([0xFF, int(rng.integers(0xC0, 0x100))]) + int(rng.integers(0, 40)).to_bytes(2, "big")


def _number(rng: np.random.Generator, data: bytearray, _: bytes) -> None:
    size, order = int(rng.choice([1, 2, 4])), "big" if rng.integers(2) else "little"
    at = int(rng.integers(min(len(data), 256)))
    value = int(rng.choice(INTERESTING)) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, order)  # type: ignore[arg-type]


MUTATIONS: list[Mutation] = [_flip, _overwrite, _cut, _remove, _repeat, _splice, _marker, _number]


def mutated(rng: np.random.Generator, files: list[bytes]) -> bytes:
    """One of the files, changed in one to four ways."""
    data, other = (files[int(rng.integers(len(files)))] for _ in range(2))
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if changed:
            MUTATIONS[int(rng.integers(len(MUTATIONS)))](rng, changed, other)
    return bytes(changed)


def try_image(data: bytes) -> str:
    """What scan makes of it, in a word.

    Raises:
        AssertionError: a row that contradicts itself.
    """
    row = image_facts(data)
    pa.RecordBatch.from_pylist([row], OF_AN_IMAGE)
    assert row["decodes"] == (not row["error"]), row
    assert not row["decodes"] or (row["format"] and row["width"] > 0 and row["height"] > 0), row
    assert min(row["width"], row["height"]) >= 0, row
    assert row["orientation"] in range(1, 9), row
    return f"{row['format'] or 'no image'} {'decodes' if row['decodes'] else 'refused'}"


def try_tar(data: bytes, folder: Path, mixed: bool) -> str:
    """Whether a tar is read; what is read must be what Python's own reader finds.

    Raises:
        AssertionError: it is not.
    """
    path = folder / ("train-00000.tar" if mixed else "train/n01.tar")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        found = [(each.offset, each.size) for each in members(path, folder)]
    except StageError:
        return "tar refused"
    if data[: tarfile.BLOCKSIZE].strip(b"\0"):
        with tarfile.open(path, "r:") as tar:
            assert found == [(each.offset_data, each.size) for each in tar], found
    return "tar read"


def try_range(numbers: Range, report: Report, files: list[bytes], seed: int) -> Tried:
    """All inputs of a range."""
    outcomes: Counter[str] = Counter()
    failures = []
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, also in the middle of a decoder
    with tempfile.TemporaryDirectory() as folder:
        for number in range(numbers.first, numbers.first + numbers.number):
            report(number)
            signal.alarm(SECONDS)
            rng = np.random.default_rng([seed, number])
            try:
                outcomes[_try(rng, number, files, Path(folder))] += 1
            except Exception as error:
                failures.append(f"input {number}: {type(error).__name__}: {error}")
        signal.alarm(0)
    return Tried(outcomes, failures, os.getpid(), _resident())


def _try(rng: np.random.Generator, number: int, files: list[bytes], folder: Path) -> str:
    if number % TARS:
        return try_image(mutated(rng, files))
    mixed = bool(rng.integers(2))
    some = [files[int(each)][: int(rng.integers(2000))] for each in rng.integers(len(files), size=5)]
    return try_tar(mutated(rng, [tar_of(some, mixed)]), folder, mixed)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def fuzz(files: list[bytes], seed: int, first: int, count: int) -> list[str]:
    """Tries `count` inputs from number `first` on, prints what came of them; what must not be."""
    pieces = deque(Range(at, min(PIECE, first + count - at)) for at in range(first, first + count, PIECE))
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    memory: dict[int, list[int]] = {}
    # Otherwise glibc keeps up to 64 MiB from the first large picture on (mallopt(3)), which looks like a leak.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 2**10)
    began = time.monotonic()
    for piece, tried in run_tasks(partial(try_range, files=files, seed=seed), pieces, worker_count()):
        if isinstance(tried, Death):
            failures.append(f"input {tried.position}: the process ended with exit code {tried.exitcode}")
            print(failures[-1], flush=True)
            rest = piece.first + piece.number - tried.position - 1
            if rest:
                pieces.append(Range(tried.position + 1, rest))
            continue
        outcomes += tried.outcomes
        failures += tried.failures
        memory.setdefault(tried.process, []).append(tried.memory)
    for process, sizes in memory.items():
        # Medians of thirds: a piece may end just after a large picture.
        thirds = [int(np.median(part)) // 2**20 for part in np.array_split(sizes, 3) if len(part)]
        print(f"process {process}: {len(sizes)} pieces, MiB by thirds: {thirds}")
        if thirds[-1] > thirds[0] + GROWTH:
            failures.append(f"process {process} grew from {thirds[0]} to {thirds[-1]} MiB")
    seconds = time.monotonic() - began
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:>8}  {outcome}")
    print(
        f"seed {seed}, inputs {first} to {first + count - 1}: {count / seconds:,.0f} a second, {len(failures)} failures"
    )
    return failures


def main() -> int:
    """Reads images, and fuzzes with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="a folder with images below it")
    parser.add_argument("--count", type=int, default=20_000, help="inputs (default 20000)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    paths = sorted(path for path in given.images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))[:2000:100]
    files = seeds_of([Image.open(path) for path in paths])
    failures = fuzz(files, given.seed, given.first, given.count)
    print("\n".join(failures[:50]), end="\n" if failures else "")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
