"""Parquet files, a few rows at a time, with the types that they have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecurve.training.data.csv_rows import check_names
from onecurve.training.data.kinds import conform, decode_type
from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

# Small enough that the same memory serves one table after another: to get new pages took longer than to decode.
_BYTES_PER_TABLE = 2 << 20
_MAX_ROWS_PER_TABLE = 65_536

# Read at once of each column. By default pyarrow reads whole row groups ahead, which may be a whole file.
_BYTES_PER_READ = 1 << 18

# What `datasets` writes beside the columns: the names of classes among them.
_FEATURES = b"huggingface"


def iterate_tables(path: Path) -> Iterator[pa.Table]:
    """The file as tables, in its order; texts that are stored as a dictionary are text. The first one has no rows.

    Raises:
        BadInput: two columns have one name, or a text is not UTF-8.
    """
    import pyarrow as pa
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BYTES_PER_READ) as file:
        check_names(file.schema_arrow.names, path)
        features = (file.schema_arrow.metadata or {}).get(_FEATURES)
        schema = pa.schema(
            [pa.field(field.name, decode_type(field.type)) for field in file.schema_arrow],
            metadata={_FEATURES: features} if features is not None else None,
        )
        yield pa.Table.from_batches([], schema)
        num_rows = 0
        for batch in file.iter_batches(batch_size=_choose_batch_size(file.metadata)):
            table = conform(pa.Table.from_batches([batch]), schema)
            try:
                table.validate(full=True)
            except pa.ArrowInvalid as error:
                where = f"rows {num_rows + 1:,} to {num_rows + len(table):,}"
                raise BadInput(f"{path}, {where}: {' '.join(str(error).split())}; write the file anew") from None
            num_rows += len(table)
            yield table
        if num_rows != file.metadata.num_rows:
            raise RuntimeError(f"{path}: {num_rows:,} rows were read of {file.metadata.num_rows:,}; please report it")


def _choose_batch_size(metadata: Any) -> int:
    num_bytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    bytes_per_row = num_bytes / max(1, metadata.num_rows)
    return int(min(max(_BYTES_PER_TABLE / max(1.0, bytes_per_row), 1), _MAX_ROWS_PER_TABLE))


def count_rows(path: Path) -> int:
    """Rows by the file's footer."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return int(file.metadata.num_rows)


def find_class_names(table: pa.Table) -> dict[str, list[str]]:
    """Names of the classes of each column whose numbers mean one, as `datasets` writes them into Parquet files."""
    features = (table.schema.metadata or {}).get(_FEATURES)
    found = {}
    for column, feature in (json.loads(features)["info"]["features"] if features is not None else {}).items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            found[column] = list(inner["names"])
    return found
