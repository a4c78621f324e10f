"""Tables as Parquet files: the same rows give the same bytes."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from stages.runtime.files import replaced_file

if TYPE_CHECKING:
    import pandas as pd  # half a second and 60 MB, which scan does without

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
