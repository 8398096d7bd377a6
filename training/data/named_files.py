"""Files that rows name, such as images: prepared data is kept by them too.

They are told apart by name, size and time of change. Their content is read once, when they are prepared; to read all of it at
every start would take as long as that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from onecurve.training.data.sources import find_format
from onecurve.training.data.tables import read_chunks


def describe_files(paths: Iterable[Path]) -> Iterator[bytes]:
    """What names each file; changes whenever the file does."""
    for path in paths:
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # A text that is no path at all.
            yield f"{path} is missing\n".encode()
        else:
            yield f"{path} {found.st_size} {found.st_mtime_ns}\n".encode()


def iterate_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a file's column, and of a column of {bytes, path} the paths; nothing of a column that the file lacks."""
    if find_format(path) == "parquet":
        yield from _iterate_parquet(path, column)
        return
    for rows in read_chunks(path):
        yield from (value for row in rows if isinstance(value := row.get(column), str))


def _iterate_parquet(path: Path, column: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        if column not in schema.names or pa.types.is_binary(kind := schema.field(column).type):
            return
        # Only the paths are read, not the images beside them.
        name = f"{column}.path" if pa.types.is_struct(kind) else column
        for batch in file.iter_batches(columns=[name]):
            if batch.num_columns:
                yield from find_texts(batch.column(0))


def find_texts(values: Any) -> Iterator[str]:
    """The texts of an Arrow array, and of an array of {bytes, path} the paths."""
    kind = values.type
    if pa.types.is_struct(kind):
        if kind.get_field_index("path") < 0:
            return
        values = pa.compute.struct_field(values, "path")
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        yield from (text for text in values.to_pylist() if text is not None)
