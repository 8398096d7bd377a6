"""Parquet files are read a few rows at a time, whatever the size of their row groups."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from onecurve.training.data.parquet_rows import iterate_tables


def test_a_row_group_is_never_whole_in_memory(tmp_path: Path) -> None:
    generator, path = random.Random(0), tmp_path / "one_group.parquet"
    texts = [generator.randbytes(1_000).hex() for _ in range(12_000)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=len(texts), compression="none")
    before, most, found = pa.total_allocated_bytes(), 0, []
    for table in iterate_tables(path):
        most = max(most, pa.total_allocated_bytes() - before)
        found += table["text"].to_pylist()
    assert found == texts
    assert most < path.stat().st_size / 2
