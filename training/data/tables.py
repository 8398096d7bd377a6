"""Tables in CSV, TSV, JSON, Parquet, CoNLL and folders of images: the one reader of training, `predict` and the launcher.

Nothing is guessed. A cell of a CSV file is text ("007" stays "007", "NA" is no gap), a value of JSON keeps its kind,
Parquet keeps its types; a fault is named by file and line or row. `read_table` gives all rows of some files as a
memory-mapped Arrow table; `read_chunks` gives rows as they came, a thousand at a time. A file may exceed memory.

    csv_rows, json_rows, parquet_rows, conll_rows, folder_rows    what is right in each format
    csv_blocks, json_blocks                          the same as Arrow tables, through Arrow's quick parsers where they agree
    kinds                                            which values can stand in one column
    table_writer                                     the rows of `read_chunks`, written again with more columns

Importing this module is cheap: pyarrow is imported by its functions.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecurve.training.data.conll_rows import iterate_sentences
from onecurve.training.data.csv_rows import CsvFile
from onecurve.training.data.folder_rows import COLUMNS, iterate_images
from onecurve.training.data.json_rows import count_objects, iterate_rows
from onecurve.training.data.kinds import MixedKinds, conform, unify_schemas
from onecurve.training.data.sources import FORMATS, WRITABLE_FORMATS, expand, find_format
from onecurve.training.data.table_writer import Layout, Survey, add_columns, join_chunks, write_chunk
from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "FORMATS", "WRITABLE_FORMATS", "Head", "Layout", "Row", "Survey", "add_columns", "count_rows", "expand", "join_chunks",
    "read_chunks", "read_class_names", "read_head", "read_table", "write_chunk",
]  # fmt: skip

ROWS_PER_CHUNK = 1_024

Row = dict[str, Any]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the machine or Arrow says about a file that it can't read, as bad input."""
    import pyarrow as pa

    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or ' '.join(str(error).split())}") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as {find_format(path)}: {' '.join(str(error).split())}") from None


# Rows ----------------------------------------------------------------------------------------------------------------


def read_chunks(path: Path) -> Iterator[list[Row]]:
    """Rows in the file's order, a thousand at a time; an empty cell of a CSV file is "".

    Raises:
        BadInput: the file can't be read; naming the line.
    """
    rows = iter(_iterate_rows(path))
    while True:
        with _naming(path):
            chunk = list(itertools.islice(rows, ROWS_PER_CHUNK))
        if not chunk:
            return
        yield chunk


def _iterate_rows(path: Path) -> Iterator[Row]:
    kind = find_format(path)
    if kind == "csv":
        with path.open("rb") as file:
            table = CsvFile(path, file)
            for cells in table.read_records():
                yield dict(zip(table.names, cells, strict=True))
    elif kind == "json":
        yield from iterate_rows(path)
    elif kind == "conll":
        yield from iterate_sentences(path)
    elif kind == "folder":
        yield from iterate_images(path)
    else:
        from onecurve.training.data.parquet_rows import iterate_tables

        for part in iterate_tables(path):
            yield from part.to_pylist()


@dataclass(frozen=True)
class Head:
    """The first rows of a file.

    Attributes:
        columns: names, in the file's order; of JSON those that these rows have.
        rows: at most as many as were asked for.
    """

    path: Path
    columns: list[str]
    rows: list[Row]


def read_head(path: Path, num_rows: int) -> Head:
    """The first rows of a file, checked as `read_table` does.

    Raises:
        BadInput: naming the first line or row that is wrong.
    """
    import pyarrow as pa

    kind = find_format(path)
    with _naming(path):
        rows = list(itertools.islice(_iterate_rows(path), num_rows))
        if kind == "json":
            _refuse_one_object(path, rows)
        if kind == "csv":
            with path.open("rb") as file:
                return Head(path, CsvFile(path, file).names, rows)
        if kind == "parquet":
            import pyarrow.parquet

            return Head(path, pyarrow.parquet.read_schema(path).names, rows)
        if kind == "conll":
            return Head(path, list(rows[0]) if rows else [], rows)
        if kind == "folder":
            return Head(path, list(COLUMNS), rows)
        from onecurve.training.data.json_blocks import build_table

        return Head(path, build_table(path, rows, pa.schema([]), 0).column_names, rows)


def _refuse_one_object(path: Path, rows: Sequence[Row]) -> None:
    """Refuse a file of one object that holds all rows: under a key of its own, or as an object for each column.

    Raises:
        BadInput: it is one.
    """
    if len(rows) != 1 or not rows[0] or not _holds_rows(list(rows[0].values())):
        return
    keys = ", ".join(map(repr, rows[0]))
    raise BadInput(
        f"{path}: is one object with lists or objects inside, under {keys}; write one object for each row: the list alone, or "
        "pandas' to_json with orient='records'"
    )


def _holds_rows(values: Sequence[Any]) -> bool:
    """Whether a list of objects that are no messages, or pandas' objects by the number of the row."""
    if len(values) == 1 and isinstance(values[0], list):
        return len(values[0]) > 1 and all(isinstance(each, dict) and each and "role" not in each for each in values[0])
    return len(values) > 1 and all(
        isinstance(value, dict) and value and all(key.isdigit() for key in value) for value in values
    )


def read_class_names(path: Path) -> dict[str, list[str]]:
    """Names of the classes of each column of a Parquet file whose numbers mean one; of other files none are known.

    Raises:
        BadInput: the file can't be read.
    """
    if find_format(path) != "parquet":
        return {}
    from onecurve.training.data.parquet_rows import find_class_names, iterate_tables

    with _naming(path):
        return find_class_names(next(iterate_tables(path)))


def count_rows(path: Path) -> int:
    """Rows of a file, without a look into lines that need none.

    Raises:
        BadInput: the file can't be read.
    """
    kind = find_format(path)
    with _naming(path):
        if kind == "json":
            return count_objects(path)
        if kind == "parquet":
            from onecurve.training.data.parquet_rows import count_rows as count_in_footer

            return count_in_footer(path)
        if kind in ("conll", "folder"):
            return sum(1 for _ in _iterate_rows(path))
        with path.open("rb") as file:
            table = CsvFile(path, file)
            return sum(1 for _ in table.read_records())


# Tables --------------------------------------------------------------------------------------------------------------


def read_table(paths: Sequence[Path], scratch: Path) -> pa.Table:
    """All rows of files of one format, in order, memory-mapped from an Arrow file that is written into `scratch`.

    Columns of CSV and TSV are strings, and an empty cell is null. Columns of JSON have the type of all their values (bool,
    int64, double, string, list, struct); a key that an object lacks is null. Parquet keeps its types, and the names of
    classes that `datasets` wrote. Several files are read as one: CSV and Parquet files have the same columns, in any order.

    Args:
        paths: as `sources.find_files` returns them.
        scratch: a folder that outlives the table.

    Raises:
        BadInput: naming file and line or row of the first fault.
    """
    import pyarrow as pa

    scratch.mkdir(parents=True, exist_ok=True)
    parts = _Parts(scratch)
    for path in paths:
        for table in _read_ahead(path, _iterate_tables(path, parts.schema)):
            if path != paths[0] and find_format(path) != "json":
                _check_columns(path, table.schema, paths[0], parts.schema)
            parts.add(path, table)
    final = parts.join()
    if parts.num_rows == 1 and find_format(paths[0]) == "json":
        _refuse_one_object(paths[0], list(_iterate_rows(paths[0])))
    whole = pa.ipc.open_file(pa.memory_map(str(final))).read_all()
    if len(whole) != parts.num_rows:
        raise RuntimeError(f"{final}: {len(whole):,} rows were stored of {parts.num_rows:,}; please report it")
    return whole


def _read_ahead(path: Path, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables; the next one is read while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, tables, None)
        while True:
            with _naming(path):
                table = waiting.result()
            if table is None:
                return
            waiting = pool.submit(next, tables, None)
            yield table


def _iterate_tables(path: Path, known: pa.Schema) -> Iterator[pa.Table]:
    kind = find_format(path)
    if kind == "csv":
        from onecurve.training.data import csv_blocks

        return csv_blocks.iterate_tables(path)
    if kind == "json":
        from onecurve.training.data import json_blocks

        return json_blocks.iterate_tables(path, known)
    if kind == "conll":
        from onecurve.training.data import conll_rows

        return conll_rows.iterate_tables(path)
    if kind == "folder":
        from onecurve.training.data import folder_rows

        return folder_rows.iterate_tables(path)
    from onecurve.training.data import parquet_rows

    return parquet_rows.iterate_tables(path)


def _check_columns(path: Path, found: pa.Schema, first: Path, known: pa.Schema) -> None:
    missing = [name for name in known.names if name not in found.names]
    added = [name for name in found.names if name not in known.names]
    if missing or added:
        differing = ([f"lacks {', '.join(missing)}"] if missing else []) + (
            [f"adds {', '.join(added)}"] if added else []
        )
        raise BadInput(
            f"{path}: {' and '.join(differing)}, compared with the columns of {first}; give all files the same"
        )
    if (found.metadata or {}) != (known.metadata or {}):  # A class's number would mean another name.
        raise BadInput(f"{path}: declares other features (such as names of classes) than {first}; write them alike")


class _Parts:
    """Arrow files of tables whose types grow: an integer column that turns out to hold decimals starts a new file.

    Attributes:
        schema: of all tables so far together.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self.folder, self.schema, self.num_rows = folder, pa.schema([]), 0
        self.files: list[Path] = []
        self.writer: Any = None

    def add(self, path: Path, table: pa.Table) -> None:
        """Append a table, which was read from `path`."""
        metadata = table.schema.metadata
        try:
            schema = unify_schemas(self.schema, table.schema).with_metadata(metadata)
        except MixedKinds as mixed:
            name, before, found = mixed.args
            raise BadInput(
                f"{path}: column {name!r} holds {found} where the files before it hold {before}; write all in one way"
            ) from None
        if self.writer is None or schema != self.schema:
            self._start(schema)
        self.writer.write_table(conform(table, schema))
        self.num_rows += len(table)

    def _start(self, schema: pa.Schema) -> None:
        import pyarrow as pa

        if self.writer is not None:
            self.writer.close()
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".arrow", delete=False) as file:
            self.files.append(Path(file.name))
        self.schema, self.writer = schema, pa.ipc.new_file(str(self.files[-1]), schema)

    def join(self) -> Path:
        """Bring all parts to the last one's types, in one file."""
        import pyarrow as pa

        parts = self.files[:]
        if len(parts) != 1:
            self._start(self.schema)
            for part in parts:
                with pa.memory_map(str(part)) as source, pa.ipc.open_file(source) as reader:
                    for number in range(reader.num_record_batches):
                        table = pa.Table.from_batches([reader.get_batch(number)])
                        self.writer.write_table(self._conform(table))
                part.unlink()
        self.writer.close()
        return self.files[-1]

    def _conform(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        try:
            return conform(table, self.schema)
        except pa.ArrowInvalid as error:
            raise BadInput(
                f"integers of more than 15 digits stand beside decimals in a column: {' '.join(str(error).split())}; write "
                "them as text"
            ) from None
