"""Asks a registered model about image files, folders and tars; writes a row for each image, as CSV or Parquet.

Folders are read with all that is below them, tars within them too; hidden files are left out. An image that cannot be
read has a row as well, which says why. Files that are no images, by name and by content, are only counted.
"""

import argparse
import csv
import io
import logging
import lzma
import os
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.params.register import Register
from stages.registry import model_process
from stages.registry.client import reachable
from stages.runtime.command import StageError, positive, run
from stages.runtime.files import replaced_file
from stages.runtime.params_file import load_section
from stages.runtime.progress import progress

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

IMAGES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged tar raises."""
MOST_BYTES = 256 * 2**20
"""Of one file; a larger one is not read."""
BATCH_BYTES = 64 * 2**20
"""A batch ends here, however few images it has, so that large photos do not fill the memory."""
ROWS = 8192
"""Written at once."""
OUT = Path("reports/predicted.csv")
"""Where git does not look: a file beside params.yaml would count as a change that no commit has (`git.dirty`)."""


@dataclass(frozen=True)
class Found:
    """A file that is asked about, or that cannot be read."""

    path: str
    data: bytes = b""
    error: str = ""


Row = dict[str, Any]
Model = Callable[[list[bytes], int], "pd.DataFrame"]
"""Encoded images and top_k to `class_id`, `name` and `probability`, lists of the best `top_k`, best first."""


def predict(sources: list[Path], total: int, model: Model, out: Path, top_k: int, batch_size: int) -> None:
    """Writes what the model says to every image of `sources` to `out`, the whole file or none.

    Args:
        total: files in `sources`, as `count` has it.

    Raises:
        StageError: no image is in them, or the model does not answer.
    """
    top_k = min(top_k, _classes(model))
    rows: list[Row] = []
    images = unreadable = 0
    with written(out, top_k) as write:
        for batch in batches(progress(visited(sources), total, "predicting"), batch_size):
            answered = asked(model, batch, top_k)
            images += len(answered)
            unreadable += sum(bool(row["error"]) for row in answered)
            rows += answered
            if len(rows) >= ROWS:
                write(rows)
                rows = []
        write(rows)
        if not images:
            names = ", ".join(map(str, sources))
            raise StageError(f"no image in {names}, by name or by content (files looked at: {total})")
    passed_over = f"; {total - images} files that are no images were passed over" if total > images else ""
    logger.info("%s: %d images, %d of them unreadable (see `error`)%s", out, images, unreadable, passed_over)


def _classes(model: Model) -> int:
    """How many classes the model tells apart, and whether it answers at all: what fails later is the image's fault."""
    from PIL import Image

    grey = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(grey, "PNG")
    try:
        return len(model([grey.getvalue()], model_process.ALL_CLASSES)["class_id"][0])
    except Exception as error:
        raise StageError(f"the model does not answer, not even to a grey image: {_first_line(error)}") from error


# ------------------------------------------------------------------------------------------------------ what is read


def count(source: Path) -> int:
    """How many files a source has, images or not.

    Raises:
        StageError: it is not there, has no files, or a folder or tar in it cannot be read.
    """
    if not source.exists():
        raise StageError(f"no such file or folder: {source}")
    files = sum(sum(1 for _ in members(path)) if is_tar(path) else 1 for path in paths(source))
    if not files:
        raise StageError(f"{source} holds no files (hidden ones are left out)")
    return files


def visited(sources: Iterable[Path]) -> Iterator[Found | None]:
    """Every file of the sources, in the order of their names; None for one that is no image and was not asked for."""
    for source in sources:
        for path in paths(source):
            if is_tar(path):
                yield from (_member(path, tar, member) for tar, member in members(path))
            else:
                yield _file(path, asked_for=path == source)


def paths(source: Path) -> Iterator[Path]:
    """The source itself, or the files below it, a folder at a time."""
    if not source.is_dir():
        yield source
        return
    seen = set()
    for root, folders, names in os.walk(source, followlinks=True, onerror=_refuse):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()  # a link to a folder that is read already
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise StageError(f"{error.filename} cannot be read: {error.strerror}")


def is_tar(path: Path) -> bool:
    """By name."""
    return path.name.lower().endswith(TARS)


def members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The files and links of a tar, compressed or not, in its order.

    Raises:
        StageError: it is no tar, or a damaged one.
    """
    try:
        with tarfile.open(path, "r:*") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it would remember all, a kilobyte each
                hidden = any(part.startswith(".") and part != "." for part in member.name.split("/"))
                if not member.isdir() and not hidden:
                    yield tar, member
            _check_end(tar)
    except DAMAGED as error:
        raise StageError(f"{path} cannot be read as a tar: {_first_line(error)}") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """Python takes a tar whose next header is cut or damaged for one that ends there: it must end, or have zeros."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if end.strip(b"\0") or 0 < len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is cut or damaged at byte {tar.offset}")


def _member(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Found | None:
    name = _readable(f"{path}/{member.name.removeprefix('./')}")
    if not member.isfile():
        return Found(name, error="a link within the tar, which is not followed") if _named(name) else None
    try:
        file = tar.extractfile(member)
        assert file is not None  # only links and folders have none
        return _image(name, file, member.size, asked_for=False)
    except DAMAGED as error:
        return Found(name, error=f"cannot be read: {_first_line(error)}")


def _file(path: Path, asked_for: bool) -> Found | None:
    name = _readable(str(path))
    if not path.is_file():
        return Found(name, error="not a file, or a link that leads nowhere") if asked_for or _named(name) else None
    try:
        with path.open("rb") as file:
            return _image(name, file, path.stat().st_size, asked_for)
    except OSError as error:
        return Found(name, error=f"cannot be read: {error.strerror}")


def _image(name: str, file: IO[bytes], size: int, asked_for: bool) -> Found | None:
    head = file.read(16)
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    if not (asked_for or _named(name) or webp or head.startswith(MAGIC)):
        return None
    if size > MOST_BYTES:
        return Found(name, error=f"{size} bytes are more than {MOST_BYTES}")
    return Found(name, head + file.read())


def _named(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGES


def _readable(name: str) -> str:
    """As UTF-8, whatever bytes the name of a file has."""
    return name.encode("utf-8", "backslashreplace").decode()


def batches(found: Iterable[Found | None], size: int) -> Iterator[list[Found]]:
    """At most `size` images, and about `BATCH_BYTES` bytes, at a time."""
    batch: list[Found] = []
    volume = 0
    for each in found:
        if each is None:
            continue
        batch.append(each)
        volume += len(each.data)
        if len(batch) == size or volume >= BATCH_BYTES:
            yield batch
            batch, volume = [], 0
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------------- what is said


def requested(model: Model, batch: list[Found], top_k: int) -> list[Row]:
    """A row for each image, in order."""
    readable = [found for found in batch if not found.error]
    answers = iter(_answers(model, readable, top_k))
    return [_row(found, [], found.error) if found.error else next(answers) for found in batch]


def _answers(model: Model, batch: list[Found], top_k: int) -> list[Row]:
    """The model refuses a batch for one damaged image, so the halves are asked until it stands alone."""
    if not batch:
        return []
    try:
        answers = model([found.data for found in batch], top_k)
    except Exception as error:
        if len(batch) == 1:
            # The model's own message names row and column of what it was sent.
            return [_row(batch[0], [], _first_line(error).rpartition("`image`: ")[2])]
        half = len(batch) // 2
        return _answers(model, batch[:half], top_k) + _answers(model, batch[half:], top_k)
    best = answers[["class_id", "name", "probability"]].to_numpy()
    return [_row(found, list(zip(*row, strict=True)), "") for found, row in zip(batch, best, strict=True)]


def _row(found: Found, best: list[tuple[int, str, float]], error: str) -> Row:
    row: Row = {"path": found.path}
    for rank, (class_id, name, probability) in enumerate(best, start=1):
        values = (int(class_id), name, round(float(probability), 6))
        row |= dict(zip(_columns(rank), values, strict=True))
    return row | {"error": error}


def _columns(rank: int) -> tuple[str, str, str]:
    """Of the class of a rank; those of the best have no number."""
    end = "" if rank == 1 else f"_{rank}"
    return f"class_id{end}", f"name{end}", f"probability{end}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(":")[:300] or type(error).__name__


@contextmanager
def written(out: Path, top_k: int) -> Iterator[Callable[[list[Row]], object]]:
    """Yields a function that writes rows to `out`; the file is there once all were written, and complete."""
    ranks = [column for rank in range(1, top_k + 1) for column in _columns(rank)]
    with replaced_file(out) as aside:
        if out.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            types = [pa.int32(), pa.string(), pa.float64()] * top_k
            fields = zip(["path", *ranks, "error"], [pa.string(), *types, pa.string()], strict=True)
            schema = pa.schema(list(fields))
            with pq.ParquetWriter(aside, schema, compression="zstd") as table:
                yield lambda rows: table.write_table(pa.Table.from_pylist(rows, schema))
        else:
            with aside.open("w", newline="", encoding="utf-8") as file:
                lines = csv.DictWriter(file, ["path", *ranks, "error"], restval="")
                lines.writeheader()
                yield lines.writerows


# ---------------------------------------------------------------------------------------------------------- command


def main() -> None:
    """Finds the model, then the images."""
    arguments = _arguments()
    warnings.filterwarnings("ignore", module="PIL")  # of a damaged image the row says what there is to say
    out: Path = arguments.out
    if out.suffix not in (".csv", ".parquet") or out.is_dir():
        raise StageError(f"--out {out}: expected the name of a file that ends in .csv or .parquet")
    if not os.access(next(folder for folder in out.absolute().parents if folder.exists()), os.W_OK):
        raise StageError(f"--out {out}: the folder may not be written to")
    address = arguments.model or f"models:/{load_section('register', Register).name}@serving"
    total = sum(count(source) for source in arguments.images)
    predict(arguments.images, total, load(address), out, arguments.top_k, arguments.batch_size)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files, folders, tars")
    parser.add_argument(
        "--model", help="models:/NAME@ALIAS or models:/NAME/VERSION; default: the one in force, of `register.name`"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="a .csv or .parquet file (%(default)s)")
    parser.add_argument("--top-k", type=positive, default=5, help="classes for each image, best first (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, help="images asked about at once (%(default)s)")
    return parser.parse_args()


def load(address: str) -> Model:
    """The model, in this process, which loads no other.

    Raises:
        StageError: there is none, or it does not load.
    """
    version = model_process.find(address)
    logger.info("asking %s version %d (gate: %s)", version.name, version.number, version.tags.get("gate", "not taken"))
    import mlflow
    import pandas as pd

    with reachable():
        try:
            model: Any = mlflow.pyfunc.load_model(version.source)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            where = f"{version.name} version {version.number}"
            raise StageError(f"{where} does not load: {_first_line(error)}") from error
    return lambda images, top_k: model.predict(pd.DataFrame({"image": images}), params={"top_k": top_k})


if __name__ == "__main__":
    run(main)
