"""What kind of values a column holds: found in the values, never guessed from their text.

JSON knows null, boolean, number, text, list and object. A column holds one of them, and null anywhere; an integer beside
a decimal is a number. Types are Arrow's: bool, int64, double, string, list, struct.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


# Arrow's files hold types that are nested up to 64 deep, and a list of objects is two.
MAX_DEPTH = 30


class MixedKinds(Exception):
    """Two kinds in one column; `args` has their words, that which was there before first."""


def infer_type(values: Sequence[Any], depth: int = 0) -> pa.DataType:
    """The type of all of these values together, each as `json` made it; they are `depth` deep in their rows.

    Raises:
        MixedKinds: they have several.
        RecursionError: they are nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise RecursionError
    import pyarrow as pa

    found = pa.null()
    for python_type in dict.fromkeys(map(type, values)):
        if python_type is list:
            inner = infer_type(list(chain.from_iterable(value for value in values if type(value) is list)), depth + 1)
            found = unify_types(found, pa.list_(inner))
        elif python_type is dict:
            objects = [value for value in values if type(value) is dict]
            keys = dict.fromkeys(chain.from_iterable(objects))
            fields = [pa.field(key, infer_type([value.get(key) for value in objects], depth + 1)) for key in keys]
            found = unify_types(found, pa.struct(fields))
        elif python_type is not type(None):
            simple = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
            found = unify_types(found, simple[python_type])
    return found


def unify_types(before: pa.DataType, found: pa.DataType) -> pa.DataType:
    """The narrowest type that holds values of both.

    Raises:
        MixedKinds: there is none.
    """
    import pyarrow as pa
    from pyarrow import types

    if before == found or types.is_null(found):
        return before
    if types.is_null(before):
        return found
    kinds = describe_type(before), describe_type(found)
    if kinds == ("number", "number"):
        return pa.int64() if types.is_integer(before) and types.is_integer(found) else pa.float64()
    if kinds == ("text", "text"):
        return pa.large_string()
    if kinds == ("list", "list"):
        inner = unify_types(before.value_type, found.value_type)
        is_large = types.is_large_list(before) or types.is_large_list(found)
        return pa.large_list(inner) if is_large else pa.list_(inner)
    if kinds == ("object", "object"):
        fields = {field.name: field.type for field in before}
        for field in found:
            fields[field.name] = unify_types(fields.get(field.name, pa.null()), field.type)
        return pa.struct(list(fields.items()))
    raise MixedKinds(*kinds)


def describe_type(found: pa.DataType) -> str:
    """The type in JSON's words where it has one."""
    from pyarrow import types

    for word, tests in {
        "boolean": (types.is_boolean,),
        "number": (types.is_integer, types.is_floating),
        "text": (types.is_string, types.is_large_string),
        "list": (types.is_list, types.is_large_list, types.is_fixed_size_list),
        "object": (types.is_struct,),
    }.items():
        if any(test(found) for test in tests):
            return word
    return str(found)


def decode_type(found: pa.DataType) -> pa.DataType:
    """The type without the encodings that only save memory: a dictionary of texts is text."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(found):
        return decode_type(found.value_type)
    if types.is_string_view(found):
        return pa.string()
    if types.is_large_list(found):
        return pa.large_list(decode_type(found.value_type))
    if types.is_list(found):
        return pa.list_(decode_type(found.value_type))
    if types.is_struct(found):
        return pa.struct([pa.field(field.name, decode_type(field.type)) for field in found])
    return found


def has_type(found: pa.DataType, test: Any) -> bool:
    """Whether this type, or one inside it, passes a test of `pyarrow.types`."""
    return bool(test(found)) or any(has_type(found.field(number).type, test) for number in range(found.num_fields))


def measure_depth(found: pa.DataType) -> int:
    """How many types are inside one another."""
    return 1 + max((measure_depth(found.field(number).type) for number in range(found.num_fields)), default=0)


def unify_schemas(before: pa.Schema, found: pa.Schema) -> pa.Schema:
    """All columns of both, those of `before` first, with the types that hold the values of both.

    Raises:
        MixedKinds: `args` begin with the column's name.
    """
    import pyarrow as pa

    columns = {field.name: field.type for field in before}
    for field in found:
        try:
            columns[field.name] = unify_types(columns.get(field.name, pa.null()), field.type)
        except MixedKinds as mixed:
            raise MixedKinds(field.name, *mixed.args) from None
    return pa.schema(list(columns.items()), metadata=before.metadata)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns and types of a schema that was unified with its own; what it lacks is null.

    Raises:
        pyarrow.ArrowInvalid: an integer is not exactly a decimal.
    """
    import pyarrow as pa

    columns = [
        _cast(table[field.name], field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _cast(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    import pyarrow as pa
    from pyarrow import types

    if column.type == wanted:
        return column
    if has_type(wanted, types.is_null):  # Arrow's cast of nulls inside a list loses count of them.
        return pa.chunked_array([pa.array(column.to_pylist(), wanted)])
    return column.cast(wanted)
