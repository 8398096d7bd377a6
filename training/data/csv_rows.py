"""CSV and TSV as RFC 4180 has them, strictly: every cell is text, and each record has as many as the header.

Decided here: a quote inside an unquoted cell is a character (`5" pipe`); blank lines are skipped, but in a table of one
column a blank line is an empty cell; a carriage return ends a line only before a line feed.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from onecurve.training.data.sources import suggest_separator
from onecurve.training.data.text_lines import MAX_CHARACTERS, Lines
from onecurve.training.errors import BadInput

# By default `csv` refuses cells of more than 128 KiB; a text may be a book.
csv.field_size_limit(MAX_CHARACTERS)


def find_delimiter(path: Path) -> str:
    """Tabs separate a .tsv, commas everything else."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


class CsvFile:
    """A CSV or TSV file that is open, its header read.

    Attributes:
        names: of the columns; none in a file without a line.
        lines: where the reading stands.
        num_blank: lines that were skipped.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.lines, self.num_blank = path, Lines(path, file), 0
        self.names: list[str] = []
        for cells in self._parse():
            if cells:
                self.names = cells
                break
            self.num_blank += 1
        check_names(self.names, path)
        for number, name in enumerate(self.names, start=1):
            if not name.strip():
                hint = " (an index of pandas? write it with index=False)" if number == 1 else ""
                raise BadInput(f"{path}: column {number} of the header has no name{hint}; name or remove it")

    def read_records(self, end: int | None = None) -> Iterator[list[str]]:
        """Cells of the records that start before the byte `end`.

        Raises:
            BadInput: naming the line of the first fault.
        """
        if not self.names or self.lines.offset == end:
            return
        start = self.lines.number
        for cells in self._parse():
            if len(cells) == len(self.names):
                yield cells
            elif not cells and len(self.names) == 1:
                yield [""]
            elif not cells:
                self.num_blank += 1
            else:
                self._refuse_width(start + 1, len(cells))
            start = self.lines.number
            if end is not None and self.lines.offset >= end:
                return

    def _parse(self) -> Iterator[list[str]]:
        start_line, start = self.lines.number, self.lines.offset
        try:
            for cells in csv.reader(self.lines, delimiter=find_delimiter(self.path), strict=True):
                yield cells
                start_line, start = self.lines.number, self.lines.offset
        except csv.Error as error:
            self._refuse(error, start_line + 1, start)

    def _refuse_width(self, line: int, width: int) -> NoReturn:
        advice = "put texts that hold the separator in double quotes"
        if width < len(self.names):
            advice = "write empty cells with their separators"
        raise BadInput(
            f"{self.path}, line {line}: {width} fields where the header has {len(self.names)}; {advice}"
            + suggest_separator(self.names)
        )

    def _refuse(self, error: csv.Error, line: int, start: int) -> NoReturn:
        """Name the cause of what `csv` found in the record that starts on this line and at this byte."""
        self.lines.file.seek(start)
        record = self.lines.file.read(self.lines.offset - start)
        found = find_bad_quote(record, find_delimiter(self.path).encode())
        if found is None:
            lone = record.replace(b"\r\n", b"  ").find(b"\r")
            if lone >= 0:
                line += record.count(b"\n", 0, lone)
                raise BadInput(
                    f"{self.path}, line {line}: holds a carriage return without a line feed; save it with line feeds"
                )
            raise BadInput(f"{self.path}, line {line}: {error}; is a double quote left open?")
        opened, closed = found
        line += record.count(b"\n", 0, opened)
        if closed is None:
            raise BadInput(
                f"{self.path}, line {line}: a double quote is opened here and never closed; "
                'write a quote inside a quoted text as two ("")'
            )
        num_lines = record.count(b"\n", opened, closed)
        where = f" on line {line + num_lines}" if num_lines else ""
        raise BadInput(
            f"{self.path}, line {line}: the double quote that is opened here is closed{where} in front of more text; "
            'is one left open? Write a quote inside a quoted text as two ("")'
        )


def find_bad_quote(record: bytes, delimiter: bytes) -> tuple[int, int | None] | None:
    """Positions where a cell's quote is opened and closed, if what follows is not the end of the cell.

    Returns:
        None as the second one where no quote closes it; None where all quotes are in order.
    """
    position = 0
    while position < len(record):
        if record[position : position + 1] == b'"':
            opened = position
            position = record.find(b'"', opened + 1)
            while position >= 0 and record[position + 1 : position + 2] == b'"':
                position = record.find(b'"', position + 2)
            if position < 0:
                return opened, None
            if record[position + 1 : position + 2] not in (delimiter, b"\n", b"\r", b""):
                return opened, position
        ends = [end for end in (record.find(delimiter, position), record.find(b"\n", position)) if end >= 0]
        position = min(ends) + 1 if ends else len(record)
    return None


def check_names(names: list[str], path: Path) -> None:
    """Refuse a table in which a name means two columns.

    Raises:
        BadInput: naming them.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"{path}: has several columns of the name {', '.join(map(repr, twice))}; rename them")
