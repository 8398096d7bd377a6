"""Rows of CSV, TSV, JSON Lines and Parquet files as they came: read and written in chunks, so a file may exceed memory.

Nothing is guessed. A cell of a CSV file is text ("007" stays "007", "NA" is no gap), a row of JSON Lines keeps the keys
that it has, Parquet keeps its types. What the output needs to know of all rows, a survey has found before the first one
is written.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from onecurve.training.errors import BadInput

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ROWS_PER_CHUNK = 1_024

Row = dict[str, Any]

# csv refuses longer cells than this, and by default 128 KiB; a text may be a book.
csv.field_size_limit(2**31 - 1)


def read_chunks(path: Path) -> Iterator[list[Row]]:
    """Rows in the file's order, a thousand at a time.

    Raises:
        BadInput: the file can't be read; naming the line.
    """
    try:
        rows = iter(
            {"csv": _read_csv, "json": _read_json, "parquet": _read_parquet}[FORMATS[path.suffix.lower()]](path)
        )
        while chunk := list(itertools.islice(rows, ROWS_PER_CHUNK)):
            yield chunk
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def _read_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"0x{raw[error.start]:02x}"
                raise BadInput(f"{path}, line {number}: byte {byte} is not UTF-8; save the file as UTF-8") from None


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(_read_lines(path), delimiter=_find_delimiter(path), strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if not names:
                names = cells
                _check_names(names, path)
            elif len(cells) > len(names):
                raise BadInput(
                    f"{path}, line {reader.line_num}: {len(cells)} fields where the header has {len(names)}; "
                    "put texts that hold the separator in double quotes"
                )
            elif cells:
                yield dict(itertools.zip_longest(names, cells, fillvalue=""))
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: {error}; is a double quote left open?") from None


def _find_delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _check_names(names: Sequence[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"{path}: has several columns of the name {', '.join(map(repr, twice))}; rename them")


def _read_json(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        is_list = file.read(4_096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    if is_list:
        try:
            rows = json.loads("".join(_read_lines(path)))
        except ValueError as error:
            raise BadInput(f"{path}: not valid JSON: {error}") from None
        numbered: Iterable[tuple[str, Any]] = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        numbered = _parse_lines(path)
    for place, row in numbered:
        if not isinstance(row, dict):
            raise BadInput(f"{path}, {place}: expected a JSON object, got {type(row).__name__}")
        yield row


def _parse_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():  # Half of such a pair is valid JSON, but no text that can be written.
                json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            raise BadInput(f"{path}, line {number}: not valid JSON: {error}; expected one object a line") from None
        yield f"line {number}", row


def _read_parquet(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        _check_names(file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=ROWS_PER_CHUNK):
            yield from batch.to_pylist()


@dataclass
class Survey:
    """What the output must know of all rows before the first is written. Show it every chunk with `look`.

    Attributes:
        columns: every name that a row has, in the order in which they appear.
        num_rows: seen so far.
    """

    input: Path
    output: Path
    columns: dict[str, None] = field(default_factory=dict)
    num_rows: int = 0
    _types: dict[str, pa.DataType] = field(default_factory=dict)

    def look(self, rows: Sequence[Row]) -> None:
        """Take note of the next rows.

        Raises:
            BadInput: a column of them can't stand in Parquet beside what came before.
        """
        for row in rows:
            self.columns.update(dict.fromkeys(row))
        if self._writes_parquet() and FORMATS[self.input.suffix.lower()] == "json":
            for name in self.columns:
                self._widen(name, [row.get(name) for row in rows])
        self.num_rows += len(rows)

    def _writes_parquet(self) -> bool:
        return FORMATS[self.output.suffix.lower()] == "parquet"

    def _widen(self, name: str, values: list[Any]) -> None:
        before = self._types.get(name, pa.null())
        try:
            found = pa.array(values).type
            pair = [pa.schema([(name, kind)]) for kind in (before, found)]
            self._types[name] = pa.unify_schemas(pair, promote_options="permissive").field(0).type
        except (pa.ArrowException, OverflowError) as error:
            where = f"rows {self.num_rows + 1:,} to {self.num_rows + len(values):,}"
            raise BadInput(
                f"{self.input}, {where}: column {name!r} holds values of several kinds, which Parquet can't keep together "
                f"({' '.join(str(error).split())}); let --output end in .jsonl"
            ) from None

    def build_layout(self, added: Row) -> Layout:
        """What the output will look like, once all rows were seen.

        Args:
            added: a row of the columns that come behind the input's.

        Raises:
            BadInput: a column is there already, or Parquet has no such type.
        """
        taken = [name for name in added if name in self.columns]
        if taken:
            raise BadInput(f"{self.input}: has columns that would be overwritten: {', '.join(taken)}; rename them")
        columns = (*self.columns, *added)
        if not self._writes_parquet():
            return Layout(self.output, columns)
        if FORMATS[self.input.suffix.lower()] == "parquet":
            schema = pyarrow.parquet.read_schema(self.input)
        else:
            schema = pa.schema([(name, self._types.get(name, pa.string())) for name in self.columns])
        for name, value in added.items():
            schema = schema.append(pa.field(name, pa.array([value]).type))
        try:
            pyarrow.parquet.ParquetWriter(io.BytesIO(), schema).close()
        except pa.ArrowException as error:
            raise BadInput(f"{self.input}: can't be written as Parquet: {error}; let --output end in .jsonl") from None
        return Layout(self.output, columns, schema)


@dataclass(frozen=True)
class Layout:
    """What every row of the output has; of JSON Lines each row has its own.

    Attributes:
        schema: of Parquet.
    """

    output: Path
    columns: tuple[str, ...]
    schema: pa.Schema | None = None

    @property
    def is_csv(self) -> bool:
        """Whether it is text with a header, also if tabs separate it."""
        return FORMATS[self.output.suffix.lower()] == "csv"


def write_chunk(path: Path, rows: Sequence[Row], layout: Layout) -> None:
    """Write a chunk as it will stand in the output: Parquet, or text without a header."""
    if layout.schema is not None:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, layout.schema), path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if layout.is_csv:
            cells = ([_to_cell(row.get(name)) for name in layout.columns] for row in rows)
            _build_csv_writer(file, layout).writerows(cells)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _build_csv_writer(file: Any, layout: Layout) -> Any:
    # Every text in quotes: csv would leave one that holds a lone carriage return without, and no reader could tell.
    delimiter = _find_delimiter(layout.output)
    return csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def _to_cell(value: Any) -> Any:
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else value


def join_chunks(chunks: Sequence[Path], layout: Layout) -> None:
    """Put the chunks behind each other and give the whole its name in one step; the chunks are used up."""
    joined = chunks[0].parent / "joined"
    if layout.schema is not None:
        with pyarrow.parquet.ParquetWriter(joined, layout.schema) as writer:
            for chunk in chunks:
                writer.write_table(pyarrow.parquet.read_table(chunk, schema=layout.schema))
                chunk.unlink()
    else:
        with joined.open("w", encoding="utf-8", newline="") as target:
            if layout.is_csv:
                _build_csv_writer(target, layout).writerow(layout.columns)
        with joined.open("ab") as target:
            for chunk in chunks:
                with chunk.open("rb") as source:
                    shutil.copyfileobj(source, target)
                chunk.unlink()
    joined.replace(layout.output)


def add_columns(rows: Sequence[Row], added: Mapping[str, Sequence[Any]]) -> list[Row]:
    """The rows with more columns behind their own."""
    return [
        {**row, **dict(zip(added, values, strict=True))}
        for row, values in zip(rows, zip(*added.values(), strict=True), strict=True)
    ]
