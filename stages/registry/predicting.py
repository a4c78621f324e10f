"""Predicts with a registered model for image files, folders and tars: a row an image, as CSV or Parquet."""

import csv
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stages.registry.client import reachable
from stages.registry.image_files import ImageFile, batches, count_files, first_line, read_files
from stages.registry.mlflow_setup import mlflow
from stages.registry.model_process import ALL_CLASSES
from stages.registry.tags import GATE
from stages.registry.versions import by_address
from stages.runtime.command import StageError
from stages.runtime.files import replaced_file
from stages.runtime.progress import progress

logger = logging.getLogger(__name__)

ROWS = 8192
"""Written at once."""

Row = dict[str, Any]
Model = Callable[[list[bytes], int], pd.DataFrame]
"""Encoded images and top_k to `class_id`, `name` and `probability`, lists of the best `top_k`, best first."""


def predict_files(sources: Sequence[Path], address: str, out: Path, top_k: int, batch_size: int) -> None:
    """Predicts for every image of `sources` with the model at `address`, and writes `out`.

    Raises:
        StageError: `out` cannot be written, there is no such model or no image, or the model does not predict.
    """
    warnings.filterwarnings("ignore", module="PIL")  # the row of a damaged image says all
    if out.suffix not in (".csv", ".parquet") or out.is_dir():
        raise StageError(f"--out {out}: expected the name of a file that ends in .csv or .parquet")
    if not os.access(next(folder for folder in out.absolute().parents if folder.exists()), os.W_OK):
        raise StageError(f"--out {out}: the folder may not be written to")
    total = sum(count_files(source) for source in sources)
    write_predictions(sources, total, load(address), out, top_k, batch_size)


def load(address: str) -> Model:
    """The model at `models:/NAME@ALIAS` or `models:/NAME/VERSION`, in this process, which loads no other.

    Raises:
        StageError: there is none, or it does not load.
    """
    version = by_address(address)
    logger.info("asking %s version %d (gate: %s)", version.name, version.number, version.tags.get(GATE, "not taken"))
    with reachable():
        try:
            model: Any = mlflow.pyfunc.load_model(version.source)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            where = f"{version.name} version {version.number}"
            raise StageError(f"{where} does not load: {first_line(error)}") from error
    return lambda images, top_k: model.predict(pd.DataFrame({"image": images}), params={"top_k": top_k})


def write_predictions(
    sources: Sequence[Path], total: int, model: Model, out: Path, top_k: int, batch_size: int
) -> None:
    """Writes what the model predicts for every image of `sources` to `out`, the whole file or none.

    Args:
        total: files in `sources`, by `count_files`.

    Raises:
        StageError: no image is in them, or the model does not predict.
    """
    top_k = min(top_k, _class_count(model))
    rows: list[Row] = []
    images = unreadable = 0
    with _writer(out, top_k) as write:
        for batch in batches(progress(read_files(sources), total, "predicting"), batch_size):
            predicted = predict_batch(model, batch, top_k)
            images += len(predicted)
            unreadable += sum(bool(row["error"]) for row in predicted)
            rows += predicted
            if len(rows) >= ROWS:
                write(rows)
                rows = []
        write(rows)
        if not images:
            names = ", ".join(map(str, sources))
            raise StageError(f"no image in {names}, by name or by content (files looked at: {total})")
    passed_over = f"; {total - images} files that are no images were passed over" if total > images else ""
    logger.info("%s: %d images, %d of them unreadable (see `error`)%s", out, images, unreadable, passed_over)


def _class_count(model: Model) -> int:
    """How many classes the model has. It predicts for a grey image: a later failure is the fault of another image."""
    grey = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(grey, "PNG")
    try:
        return len(model([grey.getvalue()], ALL_CLASSES)["class_id"][0])
    except Exception as error:
        raise StageError(f"the model does not answer, not even to a grey image: {first_line(error)}") from error


def predict_batch(model: Model, batch: list[ImageFile], top_k: int) -> list[Row]:
    """A row for each image, in order."""
    predicted = iter(_predict([file for file in batch if not file.error], model, top_k))
    return [_row(file, [], file.error) if file.error else next(predicted) for file in batch]


def _predict(batch: list[ImageFile], model: Model, top_k: int) -> list[Row]:
    """The model refuses a whole batch for one damaged image, so the batch is halved until that image is alone."""
    if not batch:
        return []
    try:
        table = model([file.data for file in batch], top_k)
    except Exception as error:
        if len(batch) == 1:
            # The model's own message names row and column of what it was sent.
            return [_row(batch[0], [], first_line(error).rpartition("`image`: ")[2])]
        half = len(batch) // 2
        return _predict(batch[:half], model, top_k) + _predict(batch[half:], model, top_k)
    best = table[["class_id", "name", "probability"]].to_numpy()
    return [_row(file, list(zip(*row, strict=True)), "") for file, row in zip(batch, best, strict=True)]


def _row(file: ImageFile, best: list[tuple[int, str, float]], error: str) -> Row:
    row: Row = {"path": file.path}
    for rank, (class_id, name, probability) in enumerate(best, start=1):
        values = (int(class_id), name, round(float(probability), 6))
        row |= dict(zip(_columns(rank), values, strict=True))
    return row | {"error": error}


def _columns(rank: int) -> tuple[str, str, str]:
    """Columns of the class of a rank; those of the best have no number."""
    end = "" if rank == 1 else f"_{rank}"
    return f"class_id{end}", f"name{end}", f"probability{end}"


@contextmanager
def _writer(out: Path, top_k: int) -> Iterator[Callable[[list[Row]], object]]:
    """Yields a function that writes rows to `out`; the file is there once all were written, and complete."""
    ranks = [column for rank in range(1, top_k + 1) for column in _columns(rank)]
    with replaced_file(out) as aside:
        if out.suffix == ".parquet":
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
