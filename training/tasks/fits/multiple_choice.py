"""Which columns multiple choice could read: a text, the choices beside it, and which one is right."""

from __future__ import annotations

import re
from collections.abc import Sequence

from onecurve.training.survey import INTEGER, LIST, TEXT, Column, Survey
from onecurve.training.tasks.fits.columns import choose_encoders, list_unread, normalize
from onecurve.training.tasks.fits.fit import NAMED, SURE, Fit

_LISTS = ("choices", "options", "endings", "candidates", "answers", "alternatives")
_LABELS = (
    "label", "answer", "answer_index", "answer_idx", "correct", "correct_answer", "correct_option", "target", "gold",
    "ans",
)  # fmt: skip
_CONTEXTS = ("context", "sent1", "article", "passage", "premise", "startphrase", "goal", "question", "sentence", "query", "ctx",
             "stem", "prompt", "text")  # fmt: skip
_QUESTIONS = ("sent2", "question")
# ending0 to ending3, option_a to option_d, choice1 and choice2, A to D.
_NUMBERED = re.compile(
    r"(?P<stem>ending|option|choice|answer|solution|sol|opt|alternative|candidate|)_?(?P<number>\d|[a-h])"
)


def find_fits(table: Survey) -> list[Fit]:
    """A fit where there are choices, a text beside them, and a column that names one of them."""
    choices = _find_choices(table)
    texts = [column for column in table.columns if column.holds(TEXT) and column not in choices]
    context = _pick(texts, _CONTEXTS)
    label = next((column for column in _order(table.columns, _LABELS) if _names_one(column, choices)), None)
    if not choices or context is None or label is None:
        return []
    question = _pick([column for column in texts if column is not context], _QUESTIONS)
    keys = {"context_column": context.name}
    if question is not None:
        keys["question_column"] = question.name
    names = [column.name for column in choices]
    read = [*keys.values(), *names, label.name]
    sizes = sorted({len(row) for row in _rows_of_choices(choices)})
    several = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    texts_read = [
        " ".join([*(str(row.get(name) or "") for name in keys.values()), max(map(str, found), key=len, default="")])
        for row, found in zip(table.rows, _rows_of_choices(choices), strict=True)
    ]
    return [
        Fit(
            keys={**keys, "choice_columns": names, "label_column": label.name},
            certainty=SURE if len(names) == 1 or len(names) > 2 else NAMED,
            reason=f"{', '.join(map(repr, names))}: {several} choices for {context.name!r}, of which {label.name!r} names one",
            models=choose_encoders(texts_read),
            training={"learning_rate": 3e-5, "metric_for_best_model": "eval_accuracy"},
            lengths={"max_length": texts_read},
            remarks=list_unread(table, read),
            facts={"labels": {str(value): count for value, count in label.counts or ()}},
        )
    ]


def _find_choices(table: Survey) -> list[Column]:
    for column in table.columns:
        if column.holds(f"{LIST} of {TEXT}") and normalize(column.name) in _LISTS:
            return [column]
    numbered: dict[str, list[Column]] = {}
    for column in table.columns:
        match = _NUMBERED.fullmatch(normalize(column.name))
        if match is not None and column.holds(TEXT):
            numbered.setdefault(match["stem"], []).append(column)
    return next((sorted(found, key=lambda column: column.name) for found in numbered.values() if len(found) > 1), [])


def _order(columns: Sequence[Column], names: Sequence[str]) -> list[Column]:
    return [column for name in names for column in columns if normalize(column.name) == name]


def _pick(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    return next(iter(_order(columns, names)), None)


def _rows_of_choices(choices: Sequence[Column]) -> list[list[str]]:
    if len(choices) == 1:
        return [list(value or ()) for value in choices[0].values]
    return [[text for text in row if text] for row in zip(*(column.values for column in choices), strict=True)]


def _names_one(column: Column, choices: Sequence[Column]) -> bool:
    """Whether its values are numbers from 0, or letters from A, of a choice."""
    if not choices or column.counts is None or not column.holds(TEXT, INTEGER):
        return False
    most = max(map(len, _rows_of_choices(choices)), default=0)
    known = {*map(str, range(most)), *"ABCDEFGHIJ"[:most]}
    return {str(value) for value, _ in column.counts} <= known
