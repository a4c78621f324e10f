"""Facts: a row an image, of what it is. Scan writes them, validate extends them, shard and evaluate read them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from stages.runtime.files import replaced_file

if TYPE_CHECKING:
    import pandas as pd  # half a second and 60 MB, which scan does without

FACTS = pa.schema(
    [
        ("key", pa.string()),  # <batch>/<source split>/<class>/<file name>: unique over all batches
        ("batch", pa.string()),
        ("source_split", pa.string()),  # train, val, test, or all (one pool)
        ("class_name", pa.string()),  # empty: unlabelled
        ("tar", pa.string()),  # raw tar, relative to data/raw/<role>/<batch>/
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("format", pa.string()),  # by magic number: JPEG, PNG, ..., empty where it is no image
        ("width", pa.int32()),  # as stored, before orientation; 0 where unknown
        ("height", pa.int32()),
        ("mode", pa.string()),  # as PIL names it: RGB, L, CMYK, P, RGBA, I;16, ...
        ("orientation", pa.int8()),  # EXIF, 1 to 8; 1 where absent
        ("decodes", pa.bool_()),  # strictly, to the last byte
        ("error", pa.string()),  # why not; empty where it decodes
        ("hash", pa.uint64()),  # perceptual (64-bit difference hash); 0 where it does not decode
        ("brightness", pa.float32()),  # mean luminance, 0-255; NaN where it does not decode
        ("contrast", pa.float32()),  # standard deviation of luminance
    ]
)
ACCEPTED = FACTS.append(pa.field("split", pa.string())).append(
    pa.field("label", pa.int32())  # index in data/classes/<role>.json; -1: unlabelled
)
QUARANTINE = (
    FACTS.append(pa.field("role", pa.string()))
    .append(pa.field("reason", pa.string()))  # the expectation that failed
    .append(pa.field("duplicate_of", pa.string()))  # key of the image that stays; empty where the reason is another
)


ROW_GROUP = 65_536


def write_table(rows: "pd.DataFrame", schema: pa.Schema, path: Path) -> None:
    """Rows in the order given, columns and types as in `schema`; the same rows give the same bytes."""
    write_tables([pa.Table.from_pandas(rows, schema=schema, preserve_index=False)], schema, path)


def write_tables(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Rows of all tables in their order, as `write_table` writes them: the bytes do not tell how the rows were parted.

    Not more than a row group and a table are in memory.
    """
    with replaced_file(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for group in _row_groups(tables, schema):
            writer.write_table(group, row_group_size=ROW_GROUP)


def read_table(path: Path) -> "pd.DataFrame":
    """A file that `write_table` wrote."""
    return pq.read_table(path).to_pandas()


def _row_groups(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of `ROW_GROUP` rows, the last one of what is left."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table.replace_schema_metadata(None))
        count += len(table)
        while count >= ROW_GROUP:
            together = pa.concat_tables(waiting)
            yield together.slice(0, ROW_GROUP).combine_chunks()
            waiting = [together.slice(ROW_GROUP)]
            count -= ROW_GROUP
    if count:
        yield pa.concat_tables([schema.empty_table(), *waiting]).combine_chunks()
