"""Which columns text classification could read: a text or a pair of texts, and a class, several classes, or a number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onecurve.training.survey import BOOLEAN, DECIMAL, INTEGER, LIST, TEXT, Column, Survey
from onecurve.training.tasks.fits.columns import (
    LABEL_NAMES,
    choose_encoders,
    find_classes,
    find_pair,
    find_texts,
    is_about_the_row,
    is_named,
    join_texts,
    list_unread,
)
from onecurve.training.tasks.fits.fit import LIKELY, NAMED, POSSIBLE, Fit

_PAIRS = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("question", "passage"), ("text1", "text2"), ("text_1", "text_2"),
    ("text_a", "text_b"), ("query", "passage"), ("query", "document"), ("claim", "evidence"),
)  # fmt: skip

# Beyond it the largest class decides the accuracy, and a model that never names a small one looks good.
_MOST_TIMES_EVEN, _LEAST_TIMES_EVEN = 1.5, 0.5
_FEWEST_ROWS_OF_CLASS = 10
_FEWEST_FLAGS = 3
_MOST_LABELS_SHOWN = 8


def find_fits(table: Survey) -> list[Fit]:
    """Fits of each text with each label; the likeliest first."""
    pair = find_pair(table, _PAIRS)
    readings = [list(pair)] if pair is not None else [[column] for column in find_texts(table)]
    labels = [*_find_labels(table)]
    return [
        _build(table, reading, columns, problem_type, labels, is_first=number == 0)
        for columns, problem_type in labels
        for number, reading in enumerate(readings)
        if not {column.name for column in columns} & {column.name for column in reading}
    ]


def _find_labels(table: Survey) -> Iterator[tuple[list[Column], str]]:
    classes = find_classes(table)
    flags = [column for column in classes if _is_flag(column)]
    if len(flags) >= 2:
        yield flags, "multi_label_classification"
    for column in classes:
        yield [column], "single_label_classification"
    for column in table.columns:
        if (
            column.holds(f"{LIST} of {TEXT}", f"{LIST} of {INTEGER}", LIST)
            and column.counts
            and not is_about_the_row(column)
        ):
            if column.num_filled >= 2 * len(column.counts) or is_named(column, LABEL_NAMES):
                yield [column], "multi_label_classification"
        elif _is_measure(column) and column not in classes:
            yield [column], "regression"


def _is_flag(column: Column) -> bool:
    if column.holds(BOOLEAN):
        return True
    return column.numbers is not None and set(column.numbers) <= {0.0, 1.0}


def _is_measure(column: Column) -> bool:
    """Numbers with decimals, or more different ones than classes have."""
    numbers = column.numbers
    if not numbers or is_about_the_row(column):
        return False
    if column.holds(DECIMAL) or not all(number.is_integer() for number in numbers):
        return True
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    numbers_rows = len(steps) == 1 and len(numbers) > 2
    return not numbers_rows and len(set(numbers)) > 1 and (is_named(column, LABEL_NAMES) or len(set(numbers)) > 2)


def _build(
    table: Survey,
    texts: Sequence[Column],
    labels: Sequence[Column],
    problem_type: str,
    others: Sequence[tuple[Sequence[Column], str]],
    is_first: bool,
) -> Fit:
    names = [column.name for column in (*texts, *labels)]
    keys: dict[str, Any] = {"text_column": texts[0].name}
    if len(texts) > 1:
        keys["text_pair_column"] = texts[1].name
    keys["label_column"] = labels[0].name if len(labels) == 1 else [column.name for column in labels]
    if problem_type != "single_label_classification":
        keys["problem_type"] = problem_type
    read = join_texts(table, [column.name for column in texts])
    training, comments, optional, found = _describe_labels(table, labels, problem_type)
    about = " and ".join(f"{column.name!r} ({column.describe()})" for column in texts)
    return Fit(
        keys=keys,
        certainty=_judge(texts, labels, problem_type, others) if is_first else POSSIBLE,
        reason=f"{about} {'are texts' if len(texts) > 1 else 'is text'}, {found['reason']}",
        models=choose_encoders(read),
        training=training,
        comments=comments,
        optional=optional,
        lengths={"max_length": read},
        remarks=[*list_unread(table, names), *found["remarks"]],
        facts=found["facts"],
    )


def _judge(
    texts: Sequence[Column], labels: Sequence[Column], problem_type: str, others: Sequence[tuple[Sequence[Column], str]]
) -> int:
    named = [columns for columns, _ in others if all(is_named(column, LABEL_NAMES) for column in columns)]
    if len(labels) > 1:
        return POSSIBLE if named else NAMED if len(labels) >= _FEWEST_FLAGS else LIKELY
    flags = next((columns for columns, _ in others if len(columns) > 1), ())
    if len(flags) >= _FEWEST_FLAGS and not named:
        return POSSIBLE
    if is_named(labels[0], LABEL_NAMES):
        return NAMED
    return POSSIBLE if named else LIKELY


def _describe_labels(
    table: Survey, labels: Sequence[Column], problem_type: str
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], dict[str, Any]]:
    """Keys of the training, what to say beside them, keys as comments, and what was found."""
    [label, *_] = labels
    if problem_type == "regression":
        numbers = label.numbers or [0.0]
        reason = f"{label.name!r} holds numbers from {min(numbers):g} to {max(numbers):g}"
        found = {"reason": reason, "remarks": [], "facts": {"numbers": [min(numbers), max(numbers)]}}
        return {"learning_rate": 3e-5, "metric_for_best_model": "eval_pearson"}, {}, {}, found
    counts = _count_labels(labels)
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:_MOST_LABELS_SHOWN])
    shown += ", ..." if len(counts) > _MOST_LABELS_SHOWN else ""
    remarks = [
        f"label {name!r} stands in {count} row{'s' * (count != 1)} only; more of them are needed to learn and to measure it"
        for name, count in counts.items()
        if count < min(_FEWEST_ROWS_OF_CLASS, table.num_rows / (4 * len(counts)))
    ][:_MOST_LABELS_SHOWN]
    training: dict[str, Any] = {"learning_rate": 3e-5}
    if problem_type == "multi_label_classification":
        several = "several columns hold 0 or 1" if len(labels) > 1 else f"{label.name!r} holds a list of labels"
        found = {"reason": f"{several}: {shown}", "remarks": remarks, "facts": {"labels": counts}}
        comments = {"metric_for_best_model": "of all decisions together"}
        return {**training, "metric_for_best_model": "eval_f1_micro"}, comments, {}, found
    even = sum(counts.values()) / len(counts)
    is_even = max(counts.values()) <= _MOST_TIMES_EVEN * even and min(counts.values()) >= _LEAST_TIMES_EVEN * even
    metric = "eval_accuracy" if is_even else "eval_f1_macro"
    why = "classes are of similar size" if is_even else "classes differ in size: the mean of their F1 counts each alike"
    reason = f"{label.name!r} has {len(counts)} classes ({shown})"
    optional = {} if is_even else {"class_weights": "balanced"}
    found = {"reason": reason, "remarks": remarks, "facts": {"labels": counts}}
    return {**training, "metric_for_best_model": metric}, {"metric_for_best_model": why}, optional, found


def _count_labels(labels: Sequence[Column]) -> Mapping[str, int]:
    """Rows of each label, most frequent first."""
    if len(labels) > 1:
        found = {
            column.name: sum(
                count for value, count in column.counts or () if str(value).lower() in ("1", "1.0", "true")
            )
            for column in labels
        }
    else:
        [label] = labels
        found = {_name(label, value): count for value, count in label.counts or ()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _name(column: Column, value: Any) -> str:
    names = column.class_names
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)
