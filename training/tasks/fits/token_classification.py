"""Which columns token classification could read: a list of words, and a list of as many labels."""

from __future__ import annotations

from onecurve.training.survey import INTEGER, LIST, TEXT, Column, Survey
from onecurve.training.tasks.fits.columns import choose_encoders, list_unread, normalize
from onecurve.training.tasks.fits.fit import NAMED, POSSIBLE, SURE, Fit
from onecurve.training.tasks.fits.labels import name_class

_WORDS = ("tokens", "words", "forms", "sentence_tokens")
# The likeliest first.
_LABELS = ("ner_tags", "ner", "tags", "labels", "label", "entities", "upos", "pos_tags", "pos")
_MOST_LABELS_SHOWN = 8


def find_fits(table: Survey) -> list[Fit]:
    """Fits of each column of words with each of labels."""
    texts = [column for column in table.columns if column.holds(f"{LIST} of {TEXT}")]
    lists = [column for column in table.columns if column.holds(f"{LIST} of {TEXT}", f"{LIST} of {INTEGER}")]
    pairs = [
        (words, labels)
        for words in sorted(texts, key=lambda column: _rank(column, _WORDS))
        for labels in sorted(lists, key=lambda column: _rank(column, _LABELS))
        if words is not labels
        and (labels.num_distinct or 0) > 1
        and _rank(labels, _WORDS)
        and _have_same_lengths(words, labels)
    ]
    return [_build(table, words, labels, number == 0) for number, (words, labels) in enumerate(pairs)]


def _rank(column: Column, names: tuple[str, ...]) -> int:
    name = normalize(column.name)
    return names.index(name) if name in names else len(names)


def _have_same_lengths(words: Column, labels: Column) -> bool:
    pairs = [(one, other) for one, other in zip(words.values, labels.values, strict=True) if one and other]
    same = sum(len(one) == len(other) for one, other in pairs)
    return same > 0.9 * len(pairs) and any(len(one) > 1 for one, _ in pairs)


def _build(table: Survey, words: Column, labels: Column, is_first: bool) -> Fit:
    is_named = _rank(words, _WORDS) < len(_WORDS) or _rank(labels, _LABELS) < len(_LABELS)
    texts = [" ".join(map(str, value or ())) for value in words.values]
    counts = {name_class(labels, value): count for value, count in labels.counts or ()}
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:_MOST_LABELS_SHOWN])
    shown += ", ..." if len(counts) > _MOST_LABELS_SHOWN else ""
    has_entities = any(name[1:2] == "-" for name in counts)
    metric = "eval_f1" if has_entities else "eval_accuracy"
    has_numbers = labels.holds(f"{LIST} of {INTEGER}") and not labels.class_names
    return Fit(
        keys={"tokens_column": words.name, "label_column": labels.name},
        certainty=(SURE if is_named else NAMED) if is_first else POSSIBLE,
        reason=f"{words.name!r} holds a list of words in each row, and {labels.name!r} as many labels ({shown})",
        models=choose_encoders(texts),
        training={"learning_rate": 3e-5, "metric_for_best_model": metric},
        comments={"metric_for_best_model": "of whole entities" if has_entities else "each word counts"},
        optional={"label_names": [str(number) for number in sorted(map(int, counts))]} if has_numbers else {},
        lengths={"max_length": texts},
        remarks=list_unread(table, [words.name, labels.name]),
        facts={"labels": counts},
    )
