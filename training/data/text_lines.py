"""The lines of a text file: UTF-8, numbered, bounded, one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from onecurve.training.errors import BadInput

# What `csv` lets a cell have at most, and `json` an object: beyond it, a quote was left open.
MAX_CHARACTERS = 2**28
BYTES_PER_BLOCK = 8 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

MAX_LINE_BYTES = 4 * MAX_CHARACTERS


class Lines:
    """The lines of a UTF-8 file without its byte order mark, each with its line feed.

    Attributes:
        number: of the last line that was read, from 1.
        offset: of the first byte behind it.

    Raises:
        BadInput: a line is no UTF-8, holds a NUL or has no end.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.number = self.offset = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(MAX_LINE_BYTES)
        if not raw:
            raise StopIteration
        self.number += 1
        is_first, self.offset = self.offset == 0, self.offset + len(raw)
        if len(raw) == MAX_LINE_BYTES:
            raise BadInput(f"{self.path}, line {self.number}: has no end within {len(raw):,} bytes")
        try:
            line = raw.decode("utf-8-sig" if is_first else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"0x{raw[error.start]:02x}"
            raise BadInput(
                f"{self.path}, line {self.number}: byte {byte} is not UTF-8; save the file as UTF-8"
            ) from None
        if "\0" in line:
            raise BadInput(f"{self.path}, line {self.number}: holds a NUL byte; is it a text file, saved as UTF-8?")
        return line

    def skip_mark(self) -> None:
        """Go on behind the byte order mark, if the file starts with one; nothing was read before."""
        self.offset = len(BYTE_ORDER_MARK) if self.file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
        self.file.seek(self.offset)

    def skip(self, num_bytes: int, num_lines: int) -> None:
        """Go on behind lines that start here and were read otherwise."""
        self.number += num_lines
        self.offset += num_bytes
        self.file.seek(self.offset)

    def check_end(self, num_expected: int) -> None:
        """Check that the lines that were accounted for are all lines that the file has.

        Raises:
            BadInput: the file grew or shrank meanwhile.
            RuntimeError: a line was lost, which is a fault of the reader.
        """
        if self.offset != os.fstat(self.file.fileno()).st_size:
            raise BadInput(f"{self.path}: was changed while it was read; start again once it is whole")
        if self.number != num_expected:
            raise RuntimeError(f"{self.path}: {num_expected:,} lines were read of {self.number:,}; please report it")
