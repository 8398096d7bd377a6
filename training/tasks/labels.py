"""Labels of rows as a loss takes them: one class, several classes, or a number for each row.

For tasks whose rows have labels of their own. Everything is computed on whole columns.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from onecurve.training.errors import BadInput
from onecurve.training.recipe import find_nearest
from onecurve.training.tasks.base import Rows

Array = NDArray[Any]

_MAX_NAMES_SHOWN = 8


def find_class_names(rows: Rows, column: str, is_list: bool) -> list[str]:
    """The classes of the training data, sorted, or as the data set's schema names them.

    Args:
        is_list: each row holds a list of labels.

    Raises:
        BadInput: the column holds no classes, or fewer than two.
    """
    if column in rows.class_names:
        return list(rows.class_names[column])
    values = rows.table.column(column)
    if is_list:
        check_lists(rows, column)
        values = pc.list_flatten(values)
    check_class_type(rows, column, values.type)
    found = pc.unique(values).drop_null().to_pylist()
    if len(found) < 2:
        raise BadInput(f"{rows.origin}: column {column!r} holds only the label {found}; two are needed")
    return [to_name(value) for value in sorted(found)]


def check_lists(rows: Rows, column: str) -> None:
    """Refuse a column whose rows are not lists of labels.

    Raises:
        BadInput: it holds something else.
    """
    kind = rows.table.column(column).type
    if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
        raise BadInput(
            f"{rows.origin}: label_column {column!r} must hold a list of labels in each row, or name several columns of 0 "
            f"and 1; it holds {kind}"
        )


def check_class_type(rows: Rows, column: str, kind: pa.DataType) -> None:
    """Refuse values that are no classes.

    Raises:
        BadInput: they are decimal numbers, dates, lists, ...
    """
    if pa.types.is_floating(kind):
        raise BadInput(
            f"{rows.origin}: column {column!r} holds decimal numbers or has empty cells; classes are integers or strings. "
            "For numbers as targets set problem_type: regression"
        )
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_string(kind) or pa.types.is_null(kind)):
        raise BadInput(f"{rows.origin}: column {column!r} holds {kind}; labels are integers or strings")


def encode_classes(rows: Rows, column: str, names: Sequence[str]) -> Array:
    """[rows] int64 numbers of the classes.

    Raises:
        BadInput: naming the first row whose label is missing or unknown.
    """
    values = rows.table.column(column).combine_chunks()
    refuse_empty(rows, column, values)
    return _encode(rows, column, values, names, np.arange(len(values)))


def encode_lists(rows: Rows, column: str, names: Sequence[str]) -> Array:
    """[rows, classes] float32: 1 where a row's list names the class.

    Raises:
        BadInput: naming the first row whose list is missing, or holds an unknown label or one label twice.
    """
    lists = rows.table.column(column).combine_chunks()
    if not pa.types.is_null(lists.type):
        check_lists(rows, column)
    refuse_empty(rows, column, lists)
    sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    positions = np.repeat(np.arange(len(lists)), sizes)
    labels = np.zeros((len(lists), len(names)), dtype=np.float32)
    if not len(positions):  # No row has a label: the type of the lists' values is unknown.
        return labels
    classes = _encode(rows, column, lists.flatten(), names, positions)
    labels[positions, classes] = 1.0
    twice = np.flatnonzero(labels.sum(axis=1) != sizes)
    if twice.size:
        rows.refuse(
            int(twice[0]),
            f"column {column!r} names a label twice: {lists[twice[0]].as_py()}; a list holds each of its row's labels "
            "once. For a 0 or 1 for each label, name several columns",
        )
    return labels


def _encode(rows: Rows, column: str, values: pa.Array, names: Sequence[str], positions: Array) -> Array:
    if column in rows.class_names:
        classes = values.cast(pa.int64())
        known = pc.fill_null(pc.and_(pc.greater_equal(classes, 0), pc.less(classes, len(names))), False)
        classes = pc.if_else(known, classes, pa.scalar(None, pa.int64()))
    else:
        check_class_type(rows, column, values.type)
        classes = pc.index_in(values.cast(pa.string()), value_set=pa.array(names, pa.string())).cast(pa.int64())
    if classes.null_count:
        place = int(pc.index(pc.is_null(classes), True).as_py())
        value = values[place].as_py()
        nearest = find_nearest(str(value), names)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        rows.refuse(
            int(positions[place]),
            f"label {value!r} of column {column!r} is not one of the {len(names)} labels of the training data, "
            f"{shorten_names(names)}{hint}",
        )
    return np.asarray(classes.to_numpy(zero_copy_only=False), dtype=np.int64)


def encode_indicators(rows: Rows, columns: Sequence[str]) -> Array:
    """[rows, columns] float32 of 0 and 1, a column for each class.

    Raises:
        BadInput: naming the first row that holds something else.
    """
    encoded = []
    for name in columns:
        values = read_numbers(rows, name, "0 and 1", takes_booleans=True)
        wrong = np.flatnonzero((values != 0) & (values != 1))
        if wrong.size:
            rows.refuse(int(wrong[0]), f"column {name!r} must be 0 or 1, got {values[wrong[0]]:g}")
        encoded.append(values)
    return np.stack(encoded, axis=1)


def encode_numbers(rows: Rows, column: str) -> Array:
    """[rows] float32.

    Raises:
        BadInput: naming the first row that holds no finite number.
    """
    values = read_numbers(rows, column, "numbers for regression")
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        rows.refuse(int(wrong[0]), f"column {column!r} must be a finite number, got {values[wrong[0]]}")
    return values


def read_numbers(rows: Rows, column: str, expected: str, takes_booleans: bool = False) -> Array:
    """[rows] float32 of a column of numbers, or of text that writes numbers, as in a CSV file.

    Args:
        expected: what the column must hold, for the message.
        takes_booleans: true is 1 and false is 0.
    """
    values = rows.table.column(column).combine_chunks()
    kind = values.type
    refuse_empty(rows, column, values)
    if _is_string(kind):
        words = {"true": 1.0, "false": 0.0} if takes_booleans else {}
        numbers = np.empty(len(values), dtype=np.float32)
        for place, text in enumerate(values.to_pylist()):
            try:
                numbers[place] = words.get(text.strip().lower(), text)
            except ValueError:
                rows.refuse(place, f"column {column!r} must hold {expected}, it holds {text!r:.40}")
        return numbers
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not (is_number or (takes_booleans and pa.types.is_boolean(kind))):
        raise BadInput(f"{rows.origin}: column {column!r} must hold {expected}, it holds {kind}")
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float32)


def refuse_empty(rows: Rows, column: str, values: pa.Array) -> None:
    """Refuse the first row without a value.

    Raises:
        BadInput: naming it.
    """
    is_empty = pc.is_null(values)
    if _is_string(values.type):
        is_empty = pc.or_(is_empty, pc.fill_null(pc.equal(values, ""), True))
    place = pc.index(is_empty, True).as_py()
    if place >= 0:
        rows.refuse(place, f"column {column!r} is empty; every row needs a label")


def find_label_problem(label: Any, name: str, problem_type: str) -> str | None:
    """What is wrong with the label of one row, as far as can be seen without the others; None where nothing is."""
    if label is None or label == "":
        return f"label column {name!r} is empty; every row needs a label"
    if problem_type == "regression":
        try:
            is_number = not isinstance(label, bool) and math.isfinite(float(label))
        except (TypeError, ValueError):
            is_number = False
        if not is_number:
            return f"label column {name!r} holds {label!r:.40}, which is not a number"
    if problem_type == "single_label_classification" and isinstance(label, float | list | dict):
        kind = type(label).__name__
        return f"label column {name!r} holds {kind} {label!r:.40}; classes are integers or strings (see problem_type)"
    return None


def compute_class_weights(
    wanted: Literal["balanced"] | Mapping[str, float], names: Sequence[str], classes: Array
) -> list[float]:
    """The weight of each class; `balanced` is num_examples / (num_classes * examples of the class), as in scikit-learn.

    Args:
        names: of the classes.
        classes: [examples] of the training data.

    Raises:
        BadInput: `wanted` does not name each class once.
    """
    if wanted == "balanced":
        per_class = np.maximum(np.bincount(classes, minlength=len(names)), 1)
        balanced: list[float] = (len(classes) / (len(names) * per_class)).tolist()
        return balanced
    unknown, missing = [name for name in wanted if name not in names], [name for name in names if name not in wanted]
    if unknown or missing:
        raise BadInput(
            f"class_weights: must name each label once; unknown {unknown}, missing {missing}, "
            f"labels are {shorten_names(names)}"
        )
    return [wanted[name] for name in names]


def to_name(value: object) -> str:
    """A label's name in the model's config."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_near_duplicates(names: Sequence[str]) -> str | None:
    """Labels that a reader would take for the same one, in a line; None where there are none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
        groups.setdefault(key, []).append(name)
    alike = [" and ".join(map(_show, group)) for group in groups.values() if len(group) > 1]
    if not alike:
        return None
    return (
        f"the labels {'; '.join(alike[:_MAX_NAMES_SHOWN])} differ only in spaces, case or the way a character is written, "
        "and are learned as different classes; write them alike if they are the same"
    )


def _show(name: str) -> str:
    """Quoted; where only characters that look alike differ, their codes tell them apart."""
    return repr(name) if name.isascii() else f"{name!r} ({ascii(name)[1:-1]})"


def shorten_names(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMES_SHOWN])
    return shown if len(names) <= _MAX_NAMES_SHOWN else f"{shown}, ... ({len(names)} in all)"


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
