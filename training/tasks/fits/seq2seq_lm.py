"""Which columns a sequence-to-sequence model could read: a text, and another one to write for it."""

from __future__ import annotations

import itertools
from typing import Any

from onecurve.training.survey import OBJECT, Column, Survey
from onecurve.training.tasks.fits.columns import find_classes, find_pair, find_texts, list_unread, normalize
from onecurve.training.tasks.fits.fit import LIKELY, NAMED, POSSIBLE, SURE, Fit, Models

_PAIRS = (
    ("source", "target"), ("src", "tgt"), ("src", "trg"), ("article", "summary"), ("article", "highlights"),
    ("document", "summary"), ("dialogue", "summary"), ("text", "summary"), ("body", "summary"), ("content", "summary"),
    ("article", "headline"), ("text", "headline"), ("input_text", "target_text"), ("original", "simplified"),
    ("original", "corrected"), ("incorrect", "correct"), ("report", "summary"), ("text", "paraphrase"),
)  # fmt: skip
_LANGUAGES = (
    "ar", "bg", "cs", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "it", "ja",
    "ko", "lt", "lv", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sv", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip
_SUMMARIES = ("summary", "highlights", "headline")
# What a T5 reads of a text, and what transformers' scripts write of it.
_MOST_TOKENS, _MOST_TARGET_TOKENS = 1024, 256


def find_fits(table: Survey) -> list[Fit]:
    """Fits of texts with the ones to write for them; the likeliest first."""
    translation = next((column for column in table.columns if _are_translations(column)), None)
    if translation is not None:
        return [_build_translation(table, translation)]
    languages = [column.name for column in table.columns if normalize(column.name) in _LANGUAGES]
    named = find_pair(table, [*_PAIRS, *itertools.combinations(map(str.lower, languages), 2)])
    texts = find_texts(table)
    pairs = [(one, other) for one, other in itertools.permutations(texts, 2)]
    certainty = LIKELY if len(texts) == 2 and not find_classes(table) else POSSIBLE
    fits = [_build(table, *pair, certainty if named is None else POSSIBLE) for pair in pairs if pair != named]
    return fits if named is None else [_build(table, *named, NAMED), *fits]


def _are_translations(column: Column) -> bool:
    return column.holds(OBJECT) and all(
        len(value) >= 2 and all(isinstance(text, str | None) and len(key) <= 7 for key, text in value.items())
        for value in column.filled
    ) and bool({key[:2] for key in column.filled[0]} & set(_LANGUAGES))  # fmt: skip


def _build_translation(table: Survey, column: Column) -> Fit:
    one, other = list(column.filled[0])[:2]
    if other == "en":
        one, other = other, one
    return _fit(
        table,
        {"translation_column": column.name, "source_lang": one, "target_lang": other},
        SURE,
        f"{column.name!r} holds a text in {' and '.join(column.filled[0])}",
        [str((value or {}).get(one) or "") for value in column.values],
        [str((value or {}).get(other) or "") for value in column.values],
        {"source_lang": f"the language that is read; {one} and {other} may change places"},
        [column.name],
    )


def _build(table: Survey, source: Column, target: Column, certainty: int) -> Fit:
    about = f"{source.name!r} ({source.describe()}) is a text, and {target.name!r} ({target.describe()}) one to write for it"
    return _fit(
        table,
        {"source_column": source.name, "target_column": target.name},
        certainty,
        about,
        [value or "" for value in source.values],
        [value or "" for value in target.values],
        {},
        [source.name, target.name],
    )


def _fit(
    table: Survey, keys: dict[str, Any], certainty: int, reason: str, sources: list[str], targets: list[str],
    comments: dict[str, str], read: list[str],
) -> Fit:  # fmt: skip
    is_summary = read[-1].lower() in _SUMMARIES
    return Fit(
        keys=keys,
        certainty=certainty,
        reason=reason,
        models=Models("google/flan-t5-small", "google/flan-t5-base"),
        training={
            **({"source_prefix": "summarize: "} if is_summary else {}),
            "learning_rate": 1e-4,
            "metric_for_best_model": "eval_rougeL" if is_summary else "eval_chrf",
        },
        comments={**comments, "source_prefix": "as T5 knows it; leave it out for other models"},
        lengths={"max_length": sources, "max_target_length": targets},
        longest={"max_length": _MOST_TOKENS, "max_target_length": _MOST_TARGET_TOKENS},
        remarks=list_unread(table, read),
    )
