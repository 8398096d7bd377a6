"""CSV and TSV files as Arrow tables, quickly.

A block of the file goes through Arrow's parser if a look at its bytes proves that it can be read in one way only, and
through Python's `csv` otherwise: blank lines, a quote inside an unquoted cell, and every fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from onecurve.training.data.csv_rows import CsvFile, find_delimiter
from onecurve.training.data.text_lines import BYTE_ORDER_MARK, BYTES_PER_BLOCK, MAX_CHARACTERS, count_lines

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_TABLE = 1_024


def iterate_tables(path: Path) -> Iterator[pa.Table]:
    """The file as tables of text columns, in its order; an empty cell is null. The first one has no rows.

    Raises:
        BadInput: naming the line of the first fault.
    """
    import pyarrow as pa

    with path.open("rb") as file:
        table = CsvFile(path, file)
        schema = pa.schema([(name, pa.string()) for name in table.names])
        yield schema.empty_table()
        num_lines, num_rows, num_inside = table.lines.number - table.num_blank, 0, 0
        while block := _read_block(file, table.lines.offset, find_delimiter(path)):
            plain = _parse_plain(block, schema, find_delimiter(path))
            if plain is None:
                file.seek(table.lines.offset)
                parts = _parse_with_csv(table, table.lines.offset + len(block), schema)
            else:
                table.lines.skip(block)
                parts = iter([plain])
            for part in parts:
                num_rows += part.num_rows
                num_inside += _count_line_feeds(part)
                yield part
    # An independent count: each line of the file is the header's, blank, the start of a row, or inside a cell.
    if count_lines(path) != num_lines + table.num_blank + num_rows + num_inside:
        raise RuntimeError(f"{path}: {num_rows:,} rows were read, and that is not all of the file; please report it")


def _read_block(file: BinaryIO, offset: int, delimiter: str) -> bytes:
    """Whole records from `offset` on, if quotes are where they should be; all the rest if they are not."""
    size = BYTES_PER_BLOCK
    while True:
        file.seek(offset)
        block = file.read(size)
        if len(block) < size:
            return block
        octets = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(octets == ord("\n"))
        if b'"' in block:
            ends = ends[np.searchsorted(np.flatnonzero(octets == ord('"')), ends) % 2 == 0]
        if len(ends):
            return block[: ends[-1] + 1]
        if size >= 4 * MAX_CHARACTERS:
            return block
        size *= 2


def _parse_plain(block: bytes, schema: pa.Schema, delimiter: str) -> pa.Table | None:
    """The records of a block that can be read in one way only; None for any other block."""
    import pyarrow as pa
    import pyarrow.csv

    if not block.endswith(b"\n"):
        block += b"\n"
    num_rows = _count_plain_records(block, len(schema), delimiter)
    if num_rows is None:
        return None
    try:
        table = pyarrow.csv.read_csv(
            pa.py_buffer(block),
            pyarrow.csv.ReadOptions(column_names=schema.names, block_size=len(block) + 1, use_threads=False),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False),
            pyarrow.csv.ConvertOptions(
                column_types=schema, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True
            ),
        )
    except pa.ArrowException:
        return None
    return table if table.num_rows == num_rows else None


def _count_plain_records(block: bytes, num_columns: int, delimiter: str) -> int | None:
    """How many records a block of whole lines holds, if each quote stands at an end of its cell; None if not."""
    if b"\0" in block or block.startswith(BYTE_ORDER_MARK) or block.count(b"\r") != block.count(b"\r\n"):
        return None
    if num_columns == 1 and (b"\n\n" in block or b"\n\r\n" in block or block.startswith((b"\n", b"\r\n"))):
        return None
    octets = np.frombuffer(block, np.uint8)
    marks = np.flatnonzero((octets == ord(delimiter)) | (octets == ord("\n")))
    if b'"' in block:
        quotes = np.flatnonzero(octets == ord('"'))
        if len(quotes) % 2:
            return None
        opened, closed = quotes[::2], quotes[1::2]
        # A quote next to another is half of an escaped one. The block ends with a line feed: what is before its first
        # byte (index -1) is one too, as it should be.
        if not _are_among(octets[opened - 1], f'{delimiter}\n"') or not _are_among(
            octets[closed + 1], f'{delimiter}\n\r"'
        ):
            return None
        marks = marks[np.searchsorted(quotes, marks) % 2 == 0]
    is_end = octets[marks] == ord("\n")
    if len(is_end) % num_columns:
        return None
    rows = is_end.reshape(-1, num_columns)
    return len(rows) if rows[:, -1].all() and not rows[:, :-1].any() else None


def _are_among(octets: Any, characters: str) -> bool:
    return bool(np.logical_or.reduce([octets == ord(character) for character in characters]).all())


def _parse_with_csv(table: CsvFile, end: int, schema: pa.Schema) -> Iterator[pa.Table]:
    import pyarrow as pa

    records = table.read_records(end)
    while rows := list(islice(records, _ROWS_PER_TABLE)):
        columns = zip(*rows, strict=True)
        arrays = [pa.array([cell or None for cell in cells], pa.string()) for cells in columns]
        yield pa.Table.from_arrays(arrays, schema=schema)


def _count_line_feeds(table: pa.Table) -> int:
    import pyarrow.compute as pc

    return sum(pc.sum(pc.count_substring(column, "\n")).as_py() or 0 for column in table.columns)
