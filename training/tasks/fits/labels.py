"""Labels of rows: which columns could be one, several, or a number, and what their counts say of the training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onecurve.training.survey import BOOLEAN, DECIMAL, INTEGER, LIST, TEXT, Column, Survey
from onecurve.training.tasks.fits.columns import find_classes, is_about_the_row, is_class, is_named_label
from onecurve.training.tasks.fits.fit import LIKELY, NAMED, POSSIBLE

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

# Beyond these the largest class decides the accuracy, and a model that never names a small one looks good.
_MOST_TIMES_EVEN, _LEAST_TIMES_EVEN = 1.5, 0.5
_FEWEST_ROWS_OF_CLASS = 10
# So many columns of 0 and 1 are one label each; two may be anything.
_FEWEST_FLAGS = 3
_MOST_WHOLE_DECIMALS = 20
_MOST_LABELS_SHOWN = 8


@dataclass(frozen=True)
class Label:
    """What could be learned of a row: the columns that hold it, and the kind of label, in transformers' words."""

    columns: tuple[Column, ...]
    problem_type: str

    @property
    def is_named(self) -> bool:
        """Whether the names of its columns say that they are labels."""
        return all(is_named_label(column) for column in self.columns)

    @property
    def names(self) -> list[str]:
        """Of its columns."""
        return [column.name for column in self.columns]

    @property
    def keys(self) -> dict[str, Any]:
        """The recipe keys that name it."""
        kind = {} if self.problem_type == SINGLE else {"problem_type": self.problem_type}
        return {"label_column": self.names[0] if len(self.columns) == 1 else self.names, **kind}


@dataclass(frozen=True)
class LabelFacts:
    """What the values of a label say; the attributes are those of a Fit."""

    reason: str
    training: Mapping[str, Any]
    facts: Mapping[str, Any]
    comments: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def find_labels(table: Survey) -> list[Label]:
    """All that could be learned of a row."""
    classes = find_classes(table)
    flags = tuple(column for column in classes if _is_flag(column))
    found = [Label(flags, MULTI)] if len(flags) > 1 else []
    found += [Label((column,), SINGLE) for column in classes]
    for column in table.columns:
        if _is_list_of_classes(column):
            found.append(Label((column,), MULTI))
        elif not is_class(column) and _is_measure(column):
            found.append(Label((column,), REGRESSION))
    return found


def _is_flag(column: Column) -> bool:
    if column.holds(BOOLEAN):
        return True
    return column.numbers is not None and set(column.numbers) <= {0.0, 1.0}


def _is_list_of_classes(column: Column) -> bool:
    is_list = column.holds(f"{LIST} of {TEXT}", f"{LIST} of {INTEGER}", LIST) and not is_about_the_row(column)
    repeats = column.counts is not None and column.num_filled >= 2 * len(column.counts) > 0
    return is_list and column.counts is not None and (repeats or is_named_label(column))


def _is_measure(column: Column) -> bool:
    """Numbers with decimals, or more different ones than classes have, and no number of the row."""
    numbers = column.numbers
    if not numbers or is_about_the_row(column) or len(set(numbers)) < 2:
        return False
    if column.holds(DECIMAL) or not all(number.is_integer() for number in numbers):
        return True
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    return len(steps) > 1


def judge(label: Label, others: Iterable[Label]) -> int:
    """How much speaks for a label among all that there could be."""
    others = list(others)
    if label.problem_type == REGRESSION and _could_be_classes(label.columns[0]):
        return POSSIBLE
    named = [each for each in others if each.is_named]
    if len(label.columns) > 1:
        return POSSIBLE if named else NAMED if len(label.columns) >= _FEWEST_FLAGS else LIKELY
    if label.is_named:
        return NAMED
    has_flags = any(len(each.columns) >= _FEWEST_FLAGS for each in others)
    return POSSIBLE if named or has_flags else LIKELY


def _could_be_classes(column: Column) -> bool:
    """Whether decimals are few and all whole, as pandas writes integers beside gaps."""
    numbers = column.numbers or []
    is_few = column.num_distinct is not None and column.num_distinct <= _MOST_WHOLE_DECIMALS
    return column.holds(DECIMAL) and is_few and all(number.is_integer() for number in numbers)


def describe_label(table: Survey, label: Label) -> LabelFacts:
    """What the label's values say: which metric is fair, which classes have few rows."""
    name = label.names[0]
    if label.problem_type == REGRESSION:
        numbers = label.columns[0].numbers or [0.0]
        least, most = min(numbers), max(numbers)
        odd = "; if these are classes, write them as integers" if _could_be_classes(label.columns[0]) else ""
        return LabelFacts(
            f"{name!r} holds numbers from {least:g} to {most:g}{odd}",
            {"learning_rate": 3e-5, "metric_for_best_model": "eval_pearson"},
            {"numbers": [least, most]},
        )
    counts = _count_rows(label)
    shown = ", ".join(f"{each} {count:,}" for each, count in list(counts.items())[:_MOST_LABELS_SHOWN])
    shown += ", ..." if len(counts) > _MOST_LABELS_SHOWN else ""
    facts = {"labels": dict(counts)}
    few = min(_FEWEST_ROWS_OF_CLASS, table.num_rows / (4 * len(counts)))
    remarks = [
        f"label {each!r} stands in {count} row{'s' * (count != 1)} only: too few to learn and to measure it well"
        for each, count in counts.items()
        if count < few
    ][:_MOST_LABELS_SHOWN]
    if label.problem_type == MULTI:
        where = "several columns hold 0 or 1" if len(label.columns) > 1 else f"{name!r} holds a list of labels"
        training = {"learning_rate": 3e-5, "metric_for_best_model": "eval_f1_micro"}
        return LabelFacts(
            f"{where} ({shown})",
            training,
            facts,
            {"metric_for_best_model": "F1 of all decisions together"},
            remarks=remarks,
        )
    even = sum(counts.values()) / len(counts)
    is_even = max(counts.values()) <= _MOST_TIMES_EVEN * even and min(counts.values()) >= _LEAST_TIMES_EVEN * even
    why = "classes are of similar size" if is_even else "classes differ in size; here each counts alike"
    return LabelFacts(
        f"{name!r} has {len(counts)} classes ({shown})",
        {"learning_rate": 3e-5, "metric_for_best_model": "eval_accuracy" if is_even else "eval_f1_macro"},
        facts,
        {"metric_for_best_model": why, "class_weights": "makes the rows of small classes count more"},
        {} if is_even else {"class_weights": "balanced"},
        remarks,
    )


def _count_rows(label: Label) -> dict[str, int]:
    """Rows of each class, most frequent first."""
    found: dict[str, int] = {}
    for column in label.columns:
        for value, count in column.counts or ():
            if len(label.columns) == 1:
                found[name_class(column, value)] = count
            elif str(value).lower() in ("1", "1.0", "true"):
                found[column.name] = count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def name_class(column: Column, value: Any) -> str:
    """The name of a class: as the schema has it, or its value."""
    names = column.class_names
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)
