"""Which columns text classification could read: a text or a pair of texts, and a class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Sequence

from onecurve.training.survey import Column, Survey
from onecurve.training.tasks.fits.columns import (
    PROMPTS,
    TEXT_NAMES,
    choose_encoders,
    find_pair,
    find_texts,
    is_named,
    join_texts,
    list_unread,
)
from onecurve.training.tasks.fits.fit import POSSIBLE, Fit
from onecurve.training.tasks.fits.labels import Label, describe_label, find_labels, judge

_PAIRS = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("question", "passage"), ("text1", "text2"), ("text_1", "text_2"),
    ("text_a", "text_b"), ("query", "passage"), ("query", "document"), ("claim", "evidence"),
)  # fmt: skip


def find_fits(table: Survey) -> list[Fit]:
    """Fits of each text with each label; the likeliest text first."""
    pair = find_pair(table, _PAIRS)
    readings = [list(pair)] if pair is not None else [[column] for column in find_texts(table)]
    labels = find_labels(table)
    # Where there are prompts and completions, a class beside them is rather what they are about.
    is_meant = find_pair(table, PROMPTS) is None or any(is_named(column, TEXT_NAMES) for column in readings[0])
    return [
        _build(table, reading, label, judge(label, labels) if number == 0 and is_meant else POSSIBLE)
        for label in labels
        for number, reading in enumerate(readings)
        if not {column.name for column in reading}.intersection(label.names)
    ]


def _build(table: Survey, texts: Sequence[Column], label: Label, certainty: int) -> Fit:
    names = [column.name for column in texts]
    pair = {"text_pair_column": names[1]} if len(names) > 1 else {}
    read, found = join_texts(table, names), describe_label(table, label)
    about = " and ".join(f"{column.name!r} ({column.describe()})" for column in texts)
    return Fit(
        keys={"text_column": names[0], **pair, **label.keys},
        certainty=certainty,
        reason=f"{about} {'are texts' if pair else 'is text'}, {found.reason}",
        models=choose_encoders(read),
        training=found.training,
        comments=found.comments,
        optional=found.optional,
        lengths={"max_length": read},
        remarks=[*list_unread(table, [*names, *label.names]), *found.remarks],
        facts=found.facts,
    )
