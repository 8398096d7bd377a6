"""The head of data files, and how many rows they hold, read without datasets or pandas."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

_BYTES_PER_READ = 1 << 20
_MAX_ARRAY_BYTES = 100 << 20

Row = dict[str, Any]


class UnreadableData(ValueError):
    """A data file that can't be read; the message names file and line."""


@dataclass(frozen=True)
class Head:
    """The first rows of a file.

    Attributes:
        columns: names, in the file's order.
        rows: at most as many as were asked for.
    """

    path: Path
    columns: list[str]
    rows: list[Row]


def expand(pattern: str) -> list[Path]:
    """The files that a recipe's pattern names."""
    if glob.has_magic(pattern):
        return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    return [Path(pattern)]


def read_head(path: Path, num_rows: int) -> Head:
    """The first rows of a CSV, TSV, JSON Lines or Parquet file.

    Raises:
        UnreadableData: the file is not what its name says; the message names the line.
    """
    try:
        rows = list(islice(iterate_rows(path), num_rows))
    except UnicodeDecodeError as error:
        raise UnreadableData(f"{path}: not UTF-8: {error.reason}; save the file as UTF-8") from None
    except OSError as error:
        raise UnreadableData(f"{path}: cannot be read: {error.strerror}") from None
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Head(path, columns, rows)


def iterate_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, one at a time.

    Raises:
        UnreadableData: naming the first line that is wrong.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _iterate_parquet(path)
    elif suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            yield from _iterate_csv(path, csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True))
    else:
        with path.open(encoding="utf-8") as file:
            start = file.read(1)
            file.seek(0)
            if start == "[" and path.stat().st_size <= _MAX_ARRAY_BYTES:
                yield from _parse(path, 1, file.read())
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = _parse(path, number, line)
                    if not isinstance(row, dict):
                        raise UnreadableData(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
                    yield row


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UnreadableData(f"{path}, line {number}: not valid JSON: {error}; expected one object a line") from None


def _iterate_csv(path: Path, reader: Any) -> Iterator[Row]:
    try:
        header = next(reader, None)
        if header is None:
            return
        for fields in reader:
            if len(fields) > len(header):
                raise UnreadableData(
                    f"{path}, line {reader.line_num}: {len(fields)} fields where the header has {len(header)}; "
                    "put texts that hold the separator in double quotes"
                )
            yield dict(zip(header, fields, strict=False))
    except csv.Error as error:
        raise UnreadableData(f"{path}, line {reader.line_num}: {error}; is a double quote left open?") from None


def _iterate_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1_000):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UnreadableData(f"{path}: not a Parquet file: {error}") from None


def count_rows(path: Path) -> int:
    """Rows of a file: from Parquet's footer, by the line otherwise.

    Raises:
        UnreadableData: as `iterate_rows`.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
    if suffix in (".csv", ".tsv"):
        return sum(1 for _ in iterate_rows(path))
    with path.open("rb") as file:
        if file.read(1) == b"[":
            return sum(1 for _ in iterate_rows(path))
        file.seek(0)
        count, last = 0, b"\n"
        while chunk := file.read(_BYTES_PER_READ):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")
