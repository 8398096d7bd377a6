"""Labels of rows as a loss takes them: one class, several classes, or a number for each row.

For tasks whose rows have labels of their own. Everything is computed on whole columns.
"""

from __future__ import annotations

import contextlib
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
        BadInput: naming the first row that holds something else.
    """
    kind = rows.table.column(column).type
    if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
        refuse_first(rows, column, "multi_label_classification")
        raise BadInput(f"{rows.origin}: column {column!r} must hold a list of labels in each row, it holds {kind}")


def check_class_type(rows: Rows, column: str, kind: pa.DataType) -> None:
    """Refuse values that are no classes.

    Raises:
        BadInput: they are decimal numbers, dates, lists, ...; naming the first row.
    """
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_string(kind) or pa.types.is_null(kind):
        return
    is_list = pa.types.is_nested(rows.table.column(column).type) and not pa.types.is_nested(kind)
    refuse_first(rows, column, "multi_label_classification" if is_list else "single_label_classification")
    raise BadInput(f"{rows.origin}: column {column!r} holds {kind}; labels are integers or strings")


def refuse_first(rows: Rows, column: str, problem_type: str, is_indicator: bool = False) -> None:
    """Refuse the first row in which `find_label_problem` sees a problem, in its words; they are those of `onecurve check`.

    Raises:
        BadInput: there is such a row.
    """
    position = 0
    for chunk in rows.table.column(column).chunks:
        for value in chunk:
            problem = find_label_problem(value.as_py(), column, problem_type, is_indicator)
            if problem is not None:
                rows.refuse(position, problem)
            position += 1


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
        rows.refuse(int(twice[0]), _describe_twice(lists[twice[0]].as_py(), column))
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
        values = read_numbers(rows, name, is_indicator=True)
        if ((values != 0) & (values != 1)).any():
            refuse_first(rows, name, "multi_label_classification", is_indicator=True)
        encoded.append(values)
    return np.stack(encoded, axis=1)


def encode_numbers(rows: Rows, column: str) -> Array:
    """[rows] float32.

    Raises:
        BadInput: naming the first row that holds no finite number.
    """
    return read_numbers(rows, column)


def read_numbers(rows: Rows, column: str, is_indicator: bool = False) -> Array:
    """[rows] float32 of a column of numbers, or of text that writes numbers, as in a CSV file.

    Args:
        is_indicator: they are 0 and 1; true is 1 and false is 0.

    Raises:
        BadInput: naming the first row that holds no finite number.
    """
    values = rows.table.column(column).combine_chunks()
    kind = values.type
    refuse_empty(rows, column, values)
    numbers = None
    if _is_string(kind):
        words = {"true": 1.0, "false": 0.0} if is_indicator else {}
        with contextlib.suppress(ValueError):
            numbers = np.array([words.get(text.strip().lower(), text) for text in values.to_pylist()], dtype=np.float32)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or (is_indicator and pa.types.is_boolean(kind)):
        numbers = np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float32)
    if numbers is None or not np.isfinite(numbers).all():
        refuse_first(rows, column, "multi_label_classification" if is_indicator else "regression", is_indicator)
        raise BadInput(f"{rows.origin}: column {column!r} must hold numbers, it holds {kind}")
    return numbers


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
        rows.refuse(place, _describe_empty(column))


def find_label_problem(label: Any, name: str, problem_type: str, is_indicator: bool = False) -> str | None:
    """What is wrong with the label of one row, as far as can be seen without the others; None where nothing is.

    Args:
        is_indicator: the column is one of several that hold 0 or 1.
    """
    if label is None or label == "":
        return _describe_empty(name)
    if is_indicator:
        is_flag = str(label).strip().lower() in ("true", "false") or _to_number(label) in (0.0, 1.0)
        return None if is_flag else f"column {name!r} must be 0 or 1, it holds {label!r:.40}"
    if problem_type == "regression":
        is_number = not isinstance(label, bool) and _to_number(label) is not None
        return None if is_number else f"column {name!r} must hold finite numbers for regression, it holds {label!r:.40}"
    if problem_type == "multi_label_classification" and not isinstance(label, list):
        return (
            f"column {name!r} must hold a list of labels in each row, it holds {label!r:.40}; or let label_column name "
            "several columns of 0 and 1"
        )
    if problem_type == "multi_label_classification" and any(label.count(each) > 1 for each in label):
        return _describe_twice(label, name)
    for each in label if problem_type == "multi_label_classification" else [label]:
        if isinstance(each, float):
            return (
                f"column {name!r} holds the decimal number {each!r}; classes are integers or strings. For numbers as targets "
                "set problem_type: regression"
            )
        if not isinstance(each, str | int):
            kind = type(each).__name__
            return f"column {name!r} holds {kind} {each!r:.40}; classes are integers or strings (see problem_type)"
    return None


def _describe_empty(name: str) -> str:
    return f"column {name!r} is empty; every row needs a label"


def _describe_twice(label: Sequence[Any], name: str) -> str:
    return (
        f"column {name!r} names a label twice: {label!r:.80}; a list holds each of its row's labels once. For a 0 or 1 for "
        "each label, name several columns"
    )


def _to_number(label: Any) -> float | None:
    """The finite number, in float32, that a label is or writes; None if it is none."""
    try:
        number = float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


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
