"""The rows of `tables.read_chunks`, written again in order with more columns, in the format of the output's name."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecurve.training.data.csv_rows import find_delimiter
from onecurve.training.data.kinds import has_type
from onecurve.training.data.sources import find_format
from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


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
        if self._writes_parquet() and find_format(self.input) in ("json", "conll"):
            for name in self.columns:
                self._widen(name, [row.get(name) for row in rows])
        self.num_rows += len(rows)

    def _writes_parquet(self) -> bool:
        return find_format(self.output) == "parquet"

    def _widen(self, name: str, values: list[Any]) -> None:
        import pyarrow as pa

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
        import pyarrow as pa
        import pyarrow.parquet

        taken = [name for name in added if name in self.columns]
        if taken:
            raise BadInput(f"{self.input}: has columns that would be overwritten: {', '.join(taken)}; rename them")
        columns = (*self.columns, *added)
        if not self._writes_parquet():
            self._refuse_bytes()
            return Layout(self.output, columns)
        if find_format(self.input) == "parquet":
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

    def _refuse_bytes(self) -> None:
        """Refuse a column that text can't hold.

        Raises:
            BadInput: naming it.
        """
        import pyarrow as pa
        import pyarrow.parquet

        if find_format(self.input) != "parquet":
            return
        for column in pyarrow.parquet.read_schema(self.input):
            if has_type(column.type, pa.types.is_binary) or has_type(column.type, pa.types.is_large_binary):
                raise BadInput(
                    f"{self.input}: column {column.name!r} holds bytes, which only Parquet can hold; let --output end in .parquet"
                )


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
        return find_format(self.output) == "csv"


def write_chunk(path: Path, rows: Sequence[Row], layout: Layout) -> None:
    """Write a chunk as it will stand in the output: Parquet, or text without a header."""
    if layout.schema is not None:
        import pyarrow as pa
        import pyarrow.parquet

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
    delimiter = find_delimiter(layout.output)
    return csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def _to_cell(value: Any) -> Any:
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else value


def join_chunks(chunks: Sequence[Path], layout: Layout) -> None:
    """Put the chunks behind each other and give the whole its name in one step; the chunks are used up."""
    joined = chunks[0].parent / "joined"
    if layout.schema is not None:
        import pyarrow.parquet

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
