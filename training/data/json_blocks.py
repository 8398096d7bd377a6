"""JSON Lines and JSON arrays as Arrow tables, quickly.

A block of lines goes through Arrow's parser if nothing in it can be read in two ways, and through Python's `json`
otherwise. What Arrow would guess (a date from a text) is kept from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from onecurve.training.data.byte_positions import find_bytes
from onecurve.training.data.json_rows import Row, is_array, iterate_array, parse_line
from onecurve.training.data.kinds import (
    MAX_DEPTH,
    MixedKinds,
    conform,
    has_type,
    infer_type,
    measure_depth,
    unify_schemas,
    unify_types,
)
from onecurve.training.data.text_lines import BYTES_PER_BLOCK, MAX_LINE_BYTES, Lines
from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_TABLE = 1_024

# Arrow's parser crashes on what is nested tens of thousands deep.
_MAX_BRACKETS = 1_000

# Up to here a double holds every integer.
_MAX_EXACT = 2.0**53


def iterate_tables(path: Path, known: pa.Schema) -> Iterator[pa.Table]:
    """The file as tables, in its order, each with all columns so far.

    Args:
        known: columns of files before this one, whose kinds hold here too.

    Raises:
        BadInput: naming the line of the first fault, or the first row of another kind.
    """
    num_rows = 0
    if is_array(path):
        for rows in _cut(iterate_array(path)):
            table = build_table(path, rows, known, num_rows)
            known, num_rows = table.schema, num_rows + len(rows)
            yield table
        return
    with path.open("rb") as file:
        lines = Lines(path, file)
        lines.skip_mark()
        num_blank = 0
        while block := file.read(BYTES_PER_BLOCK) + file.readline(MAX_LINE_BYTES):
            table = _parse_plain(block, known)
            if table is not None:
                lines.skip(len(block), len(table))
                tables = iter([table])
            else:
                file.seek(lines.offset)
                tables = _parse_with_json(lines, lines.offset + len(block), known, num_rows)
                num_blank += sum(not line.strip(b" \t\n\r") for line in block.removesuffix(b"\n").split(b"\n"))
            for table in tables:
                known, num_rows = table.schema, num_rows + len(table)
                yield table
        lines.check_end(num_rows + num_blank)


def _parse_plain(block: bytes, known: pa.Schema) -> pa.Table | None:
    """The rows of a block of lines that Arrow reads as `json` does; None for any other block."""
    import pyarrow as pa
    from pyarrow import types

    if not block.endswith(b"\n"):
        block += b"\n"
    num_lines = _count_plain_lines(block)
    if num_lines is None:
        return None
    schema = pa.schema([field for field in known if not has_type(field.type, types.is_null)])
    try:
        try:
            table = _parse_with_arrow(block, schema, is_complete=len(schema) == len(known) > 0)
        except pa.ArrowException:
            table = _parse_with_arrow(block, schema, is_complete=False)
        if any(has_type(field.type, types.is_temporal) for field in table.schema):
            schema = pa.schema([pa.field(field.name, _keep_text(field.type)) for field in table.schema])
            table = _parse_with_arrow(block, schema, is_complete=False)
        if not table.num_columns or table.num_rows != num_lines or not all(map(_is_exact, table.itercolumns())):
            return None
        if any(measure_depth(field.type) > MAX_DEPTH + 1 or _has_inner_null(field.type) for field in table.schema):
            return None
        table.validate()
        return conform(table, unify_schemas(known, table.schema))
    except (pa.ArrowException, MixedKinds, RecursionError):
        return None


def _has_inner_null(found: pa.DataType) -> bool:
    """Whether nothing but null is inside a list or an object. Arrow's parser loses count of these."""
    from pyarrow import types

    return not types.is_null(found) and has_type(found, types.is_null)


def _count_plain_lines(block: bytes) -> int | None:
    """How many lines a block has, if each begins and ends as an object does and is nested sanely; None if not."""
    octets = np.frombuffer(block, np.uint8)
    ends = find_bytes(octets, "\n")
    last = octets[ends - 1 - (octets[ends - 1] == ord("\r"))]
    if not block.startswith(b"{") or (octets[ends[:-1] + 1] != ord("{")).any() or (last != ord("}")).any():
        return None
    # An opening bracket and an opening brace differ in one bit.
    if np.count_nonzero((octets | 0x20) == ord("{")) > len(ends) + _MAX_BRACKETS:
        brackets_of_lines = np.bincount(np.searchsorted(ends, find_bytes(octets, "[{")))
        if brackets_of_lines.max() > _MAX_BRACKETS:
            return None
    try:
        if not block.isascii():
            block.decode()
    except UnicodeDecodeError:
        return None
    return len(ends)


def _parse_with_arrow(block: bytes, schema: pa.Schema, is_complete: bool) -> pa.Table:
    """The rows of a block; columns that the schema lacks are found, unless it is complete."""
    import pyarrow as pa
    import pyarrow.json

    # Arrow compares the kinds of values with the schema or within a block, never between blocks: it can parse several at
    # a time only where nothing has to be found.
    return pyarrow.json.read_json(
        pa.py_buffer(block),
        pyarrow.json.ReadOptions(
            use_threads=is_complete, block_size=max(len(block) // 4, 1 << 20) if is_complete else len(block) + 1
        ),
        pyarrow.json.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior="error" if is_complete else "infer"
        ),
    )


def _keep_text(found: pa.DataType) -> pa.DataType:
    """A type that Arrow guessed, with text for what it took for a date."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_temporal(found):
        return pa.string()
    if types.is_list(found):
        return pa.list_(_keep_text(found.value_type))
    if types.is_struct(found):
        return pa.struct([pa.field(field.name, _keep_text(field.type)) for field in found])
    return found


def _is_exact(column: Any) -> bool:
    """Whether no decimal of a column, or inside it, can be a rounded integer, infinite or not a number."""
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_floating(column.type):
        return pc.all(pc.less(pc.abs(column), _MAX_EXACT)).as_py() is not False
    if types.is_list(column.type):
        return _is_exact(pc.list_flatten(column))
    if types.is_struct(column.type):
        return all(_is_exact(pc.struct_field(column, [number])) for number in range(column.type.num_fields))
    return True


def _parse_with_json(lines: Lines, end: int, known: pa.Schema, num_before: int) -> Iterator[pa.Table]:
    def parse() -> Iterator[Row]:
        while lines.offset < end:
            row = parse_line(next(lines), f"{lines.path}, line {lines.number}")
            if row is not None:
                yield row

    for rows in _cut(parse()):
        table = build_table(lines.path, rows, known, num_before)
        known, num_before = table.schema, num_before + len(rows)
        yield table


def _cut(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _ROWS_PER_TABLE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def build_table(path: Path, rows: list[Row], known: pa.Schema, num_before: int) -> pa.Table:
    """A table of rows, of whose columns some are known from `num_before` rows before them.

    Raises:
        BadInput: naming the first row whose value is of another kind than those before.
    """
    import pyarrow as pa

    names = dict.fromkeys(known.names)
    for row in rows:
        names.update(dict.fromkeys(row))
    if rows and not names:
        raise BadInput(f"{path}, row {num_before + 1}: has no keys; expected an object with a key for each column")
    fields, arrays = [], []
    for name in names:
        values = [row.get(name) for row in rows]
        before = known.field(name).type if name in known.names else pa.null()
        try:
            found = unify_types(before, infer_type(values))
            array = pa.array(values, found)
            if not _is_finite(array):
                raise OverflowError
        except (MixedKinds, RecursionError, OverflowError, pa.ArrowException):
            _refuse_value(path, name, values, before, num_before)
        fields.append(pa.field(name, found))
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _is_finite(column: Any) -> bool:
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_floating(column.type):
        return pc.all(pc.is_finite(column)).as_py() is not False
    if types.is_list(column.type):
        return _is_finite(pc.list_flatten(column))
    if types.is_struct(column.type):
        return all(_is_finite(pc.struct_field(column, [number])) for number in range(column.type.num_fields))
    return True


def _refuse_value(path: Path, name: str, values: list[Any], before: pa.DataType, num_before: int) -> NoReturn:
    """Name the first row that can't stand in a column with those before it."""
    import pyarrow as pa

    whole = before
    for number, value in enumerate(values, start=num_before + 1):
        place = f"{path}, row {number}: column {name!r}"
        try:
            whole = unify_types(whole, infer_type([value]))
        except MixedKinds as mixed:
            raise BadInput(
                f"{place} holds {mixed.args[1]} where it held {mixed.args[0]} before; write all its values in one way"
            ) from None
        except RecursionError:
            raise BadInput(f"{place} is nested more than {MAX_DEPTH} deep") from None
    for number, value in enumerate(values, start=num_before + 1):
        try:
            if _is_finite(pa.array([value], whole)):
                continue
        except (OverflowError, pa.ArrowException):
            pass
        raise BadInput(
            f"{path}, row {number}: column {name!r} holds a number of more digits or a greater one than 64 bits can "
            "hold; write it as text"
        )
    raise RuntimeError(f"{path}: column {name!r} could not be stored as {whole}; please report it")
