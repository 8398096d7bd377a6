"""JSON Lines and JSON arrays of objects, strictly: each value keeps its kind, and a fault is named by line or row.

Decided here: NaN and Infinity are refused, they are no JSON; so are a key twice in an object, half of a surrogate pair,
an integer beyond 64 bits, and objects nested more than 32 deep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from onecurve.training.data.kinds import MAX_DEPTH
from onecurve.training.data.text_lines import BYTE_ORDER_MARK, BYTES_PER_BLOCK, MAX_CHARACTERS, Lines
from onecurve.training.errors import BadInput

Row = dict[str, Any]

_SPACE = re.compile(r"[ \t\n\r]*")


def _build_object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write null, or leave the row out")


_DECODER = json.JSONDecoder(object_pairs_hook=_build_object, parse_constant=_refuse_constant)


def is_array(path: Path) -> bool:
    """Whether the file is one array rather than an object a line."""
    with path.open("rb") as file:
        while head := file.read(4_096):
            head = head.removeprefix(BYTE_ORDER_MARK).lstrip(b" \t\n\r")
            if head:
                return head.startswith(b"[")
    return False


def iterate_rows(path: Path) -> Iterator[Row]:
    """Rows of the file, one at a time.

    Raises:
        BadInput: naming the first line (of an array: row and line) that is wrong.
    """
    if is_array(path):
        yield from iterate_array(path)
        return
    with path.open("rb") as file:
        lines = Lines(path, file)
        for line in lines:
            row = parse_line(line, f"{path}, line {lines.number}")
            if row is not None:
                yield row


def parse_line(line: str, place: str) -> Row | None:
    """The object of a line; None of a blank one.

    Raises:
        BadInput: naming the place.
    """
    if not line.strip(" \t\n\r"):
        return None
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: {_describe(error)}; expected one object a line") from None
    return _check_row(row, line, place)


def _check_row(row: Any, text: str, place: str) -> Row:
    if not isinstance(row, dict):
        raise BadInput(f"{place}: expected a JSON object, got {type(row).__name__}")
    if "\\u" in text:  # Half of a surrogate pair is valid JSON, but no text that can be stored.
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadInput(f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    return row


def _describe(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested more than {MAX_DEPTH} deep"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return f"not valid JSON: {error}"


# Arrays --------------------------------------------------------------------------------------------------------------


class _Text:
    """A window of a file's text, filled from behind and emptied from the front."""

    def __init__(self, path: Path, file: TextIOWrapper) -> None:
        self.path, self.file = path, file
        self.text, self.position, self.line, self.is_whole = "", 0, 1, False

    def fill(self) -> None:
        self.line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :], 0
        try:
            more = self.file.read(max(BYTES_PER_BLOCK, len(self.text)))
        except UnicodeDecodeError:
            with self.path.open("rb") as file:
                for _ in Lines(self.path, file):  # Raises where the line is that can't be decoded.
                    pass
            raise
        self.text, self.is_whole = self.text + more, not more

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text) or self.is_whole:
                return self.text[self.position : self.position + 1]
            self.fill()

    def place(self, number: int) -> str:
        return f"{self.path}, row {number} (line {self.line + self.text.count(chr(10), 0, self.position)})"

    def decode(self, number: int) -> Row:
        """The object that begins here."""
        while True:
            try:
                row, end = _DECODER.raw_decode(self.text, self.position)
                break
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if self.is_whole or not is_cut or len(self.text) - self.position > MAX_CHARACTERS:
                    raise BadInput(f"{self.place(number)}: not valid JSON: {error.msg}") from None
                self.fill()
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{self.place(number)}: {_describe(error)}") from None
        checked = _check_row(row, self.text[self.position : end], self.place(number))
        self.position = end
        return checked


def iterate_array(path: Path) -> Iterator[Row]:
    """Objects of the array that the file is.

    Raises:
        BadInput: naming row and line of the first fault.
    """
    kinds = {'"': "str", "[": "list", "n": "null", "t": "bool", "f": "bool"}
    with path.open("rb") as raw:
        text = _Text(path, TextIOWrapper(raw, encoding="utf-8-sig", newline=""))
        text.peek()
        text.position += 1
        number = 0
        while (character := text.peek()) != "]" or number:
            number += 1
            if character != "{":
                found = kinds.get(character, "a number" if character in "-0123456789" and character else "")
                what = f"expected a JSON object, got {found}" if found else "not valid JSON: expected an object"
                raise BadInput(f"{text.place(number)}: {what}")
            yield text.decode(number)
            character = text.peek()
            if character not in (",", "]"):
                raise BadInput(f"{text.place(number)}: not valid JSON: expected a comma or ] behind the object")
            if character == "]":
                break
            text.position += 1
        text.position += 1
        if text.peek():
            raise BadInput(f"{text.place(number)}: not valid JSON: more text behind the end of the array")


def count_objects(path: Path) -> int:
    """Lines that are not blank; of an array, its objects.

    Raises:
        BadInput: of an array.
    """
    if is_array(path):
        return sum(1 for _ in iterate_array(path))
    with path.open("rb") as file:
        return sum(1 for line in file if line.removeprefix(BYTE_ORDER_MARK).strip(b" \t\n\r"))
