"""Which columns question answering could read: those of SQuAD, whatever their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onecurve.training.survey import LIST, OBJECT, TEXT, Column, Survey
from onecurve.training.tasks.fits.columns import choose_encoders, is_about_the_row, list_unread, normalize
from onecurve.training.tasks.fits.fit import SURE, Fit

# What run_qa of transformers takes; a longer context is cut into windows.
_MOST_TOKENS = 384
# Of it, what two windows have in common.
_SHARE_OF_OVERLAP = 1 / 3


def find_fits(table: Survey) -> list[Fit]:
    """A fit where a column holds answers and their places in a text."""
    answers = next((column for column in table.columns if _are_answers(column)), None)
    texts = [column for column in table.columns if column.holds(TEXT) and not is_about_the_row(column)]
    question = next((column for column in texts if "question" in normalize(column.name)), None)
    others = sorted((column for column in texts if column is not question), key=lambda column: -column.mean_words)
    if answers is None or question is None or not others:
        return []
    named = [column for column in others if normalize(column.name) in ("context", "passage", "paragraph", "document")]
    context = [*named, *others][0]
    names = {"question_column": question.name, "context_column": context.name, "answers_column": answers.name}
    unanswered = sum(_is_empty(value) for value in answers.filled)
    texts_read = [f"{one or ''} {other or ''}" for one, other in zip(question.values, context.values, strict=True)]
    share = f"; {unanswered / max(1, len(answers.filled)):.0%} of the questions have no answer" if unanswered else ""
    return [
        Fit(
            keys={**names, **({"version_2_with_negative": True} if unanswered else {})},
            certainty=SURE,
            reason=f"{answers.name!r} says which text answers {question.name!r} and where it stands in {context.name!r}{share}",
            models=choose_encoders(context.filled),
            training={"learning_rate": 3e-5, "num_train_epochs": 2, "metric_for_best_model": "eval_f1"},
            comments={
                "version_2_with_negative": "some questions have no answer",
                "doc_stride": "what two windows of a longer context have in common",
            },
            lengths={"max_length": texts_read},
            longest={"max_length": _MOST_TOKENS},
            shares={"doc_stride": ("max_length", _SHARE_OF_OVERLAP)},
            remarks=list_unread(table, names.values()),
            facts={"unanswered_share": unanswered / max(1, len(answers.filled))},
        )
    ]


def _are_answers(column: Column) -> bool:
    if not column.holds(OBJECT, f"{LIST} of {OBJECT}", LIST):
        return False
    places = [value for value in column.filled if value]
    return bool(places) and all(_has_places(value) for value in places)


def _has_places(value: Any) -> bool:
    if isinstance(value, Mapping):
        return {"text", "answer_start"} <= value.keys()
    return all(isinstance(each, Mapping) and {"text", "answer_start"} <= each.keys() for each in value)


def _is_empty(value: Any) -> bool:
    return not (value["text"] if isinstance(value, Mapping) else value)
