"""CSV and TSV files as Arrow tables, quickly.

A block of the file goes through Arrow's parser if a look at its bytes proves that it can be read in one way only, and
through Python's `csv` otherwise: blank lines, a quote inside an unquoted cell, and every fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from onecurve.training.data.byte_positions import find_bytes
from onecurve.training.data.csv_rows import CsvFile, find_delimiter
from onecurve.training.data.text_lines import BYTE_ORDER_MARK, BYTES_PER_BLOCK, MAX_CHARACTERS

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_TABLE = 1_024


def iterate_tables(path: Path) -> Iterator[pa.Table]:
    """The file as tables of text columns, in its order; an empty cell is null. The first one has no rows.

    Raises:
        BadInput: naming the line of the first fault.
    """
    import pyarrow as pa

    delimiter = find_delimiter(path)
    with path.open("rb") as file:
        table = CsvFile(path, file)
        schema = pa.schema([(name, pa.string()) for name in table.names])
        yield pa.Table.from_batches([], schema)
        # An independent count: each line of the file is the header's, blank, the start of a row, or inside a cell.
        num_lines = table.lines.number - table.num_blank
        while block := _read_block(file, table.lines.offset):
            plain = _parse_plain(block, schema, delimiter)
            if plain is not None:
                table.lines.skip(len(block.content), block.num_lines)
                num_lines += block.num_lines
                yield plain
                continue
            for part in _parse_with_csv(table, len(block.content), schema):
                num_lines += len(part) + _count_line_feeds(part)
                yield part
        table.lines.check_end(num_lines + table.num_blank)


@dataclass(frozen=True)
class _Block:
    """Bytes of a file from the start of a record.

    Attributes:
        num_lines: line feeds.
        ends: positions of the line feeds that have an even number of quotes before them.
        quotes: positions of double quotes.
    """

    content: bytes
    num_lines: int
    ends: NDArray[np.int64]
    quotes: NDArray[np.int64]


def _read_block(file: BinaryIO, offset: int) -> _Block | None:
    """Whole records from `offset` on, if quotes are where they should be; None at the end of the file."""
    size = BYTES_PER_BLOCK
    while True:
        file.seek(offset)
        content = file.read(size)
        if not content:
            return None
        octets = np.frombuffer(content, np.uint8)
        line_ends, quotes = find_bytes(octets, "\n"), find_bytes(octets, '"')
        ends = line_ends[np.searchsorted(quotes, line_ends) % 2 == 0] if len(quotes) else line_ends
        if len(content) < size or size > 4 * MAX_CHARACTERS:
            return _Block(content, len(line_ends), ends, quotes)
        if len(ends):
            end = int(ends[-1]) + 1
            return _Block(content[:end], int(np.searchsorted(line_ends, end)), ends, quotes[quotes < end])
        size *= 2


def _parse_plain(block: _Block, schema: pa.Schema, delimiter: str) -> pa.Table | None:
    """The records of a block that can be read in one way only; None for any other block.

    Arrow refuses a record of another width than the schema, but not a blank line.
    """
    import pyarrow as pa
    import pyarrow.csv

    if not _is_plain(block, delimiter) or (len(schema) > 1 and _has_blank_lines(block)):
        return None
    try:
        table = pyarrow.csv.read_csv(
            pa.py_buffer(block.content),
            pyarrow.csv.ReadOptions(column_names=schema.names, block_size=len(block.content) + 1, use_threads=False),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False),
            pyarrow.csv.ConvertOptions(
                column_types=schema, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True
            ),
        )
    except pa.ArrowException:
        return None
    return table if len(table) == len(block.ends) else None


def _is_plain(block: _Block, delimiter: str) -> bool:
    """Whether the block is whole lines that only line feeds end, and each quote stands at an end of its cell."""
    content, octets = block.content, np.frombuffer(block.content, np.uint8)
    if not content.endswith(b"\n") or b"\0" in content or content.startswith(BYTE_ORDER_MARK):
        return False
    if b"\r" in content and not _are_among(octets[find_bytes(octets, "\r") + 1], "\n"):
        return False
    opened, closed = block.quotes[::2], block.quotes[1::2]
    # A quote next to another is half of an escaped one. A block ends with a line feed: what is before its first byte
    # (index -1) is one too, as it should be.
    return (
        len(opened) == len(closed)
        and _are_among(octets[opened - 1], f'{delimiter}\n"')
        and _are_among(octets[closed + 1], f'{delimiter}\n\r"')
    )


def _has_blank_lines(block: _Block) -> bool:
    octets = np.frombuffer(block.content, np.uint8)
    lengths = np.diff(block.ends, prepend=-1) - 1
    return bool((lengths == 0).any() or ((lengths == 1) & (octets[block.ends - 1] == ord("\r"))).any())


def _are_among(octets: NDArray[np.uint8], characters: str) -> bool:
    return bool(np.logical_or.reduce([octets == ord(character) for character in characters]).all())


def _parse_with_csv(table: CsvFile, num_bytes: int, schema: pa.Schema) -> Iterator[pa.Table]:
    import pyarrow as pa

    table.lines.file.seek(table.lines.offset)
    records = table.read_records(table.lines.offset + num_bytes)
    while rows := list(islice(records, _ROWS_PER_TABLE)):
        columns = zip(*rows, strict=True)
        arrays = [pa.array([cell or None for cell in cells], pa.string()) for cells in columns]
        yield pa.Table.from_arrays(arrays, schema=schema)


def _count_line_feeds(table: pa.Table) -> int:
    """In the cells of a table that is no slice of another."""
    texts = [chunk.buffers()[2] for column in table.itercolumns() for chunk in column.chunks]
    return sum(int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("\n"))) for text in texts if text is not None)
