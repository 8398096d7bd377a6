"""What several tasks look for in columns: texts, labels, pairs of names that belong together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from onecurve.training.survey import BOOLEAN, INTEGER, TEXT, Column, Survey
from onecurve.training.tasks.fits.fit import ENGLISH_ENCODERS, MULTILINGUAL_ENCODERS, Models

LABEL_NAMES = frozenset(
    {
        "label", "labels", "class", "classes", "category", "categories", "target", "targets", "y", "sentiment",
        "emotion", "intent", "topic", "stars", "star", "rating", "score", "tag", "tags", "genre", "genres", "grade",
        "polarity", "spam", "is_spam", "similarity", "similarity_score", "gold_label", "coarse_label",
        "fine_label", "label_text", "label_name",
    }
)  # fmt: skip
TEXT_NAMES = frozenset(
    {
        "text", "texts", "sentence", "sentences", "content", "review", "comment", "comments", "tweet", "document",
        "doc", "message", "body", "abstract", "description", "utterance", "question", "query", "headline", "title",
        "post", "article", "email", "sms", "statement", "claim", "passage", "paragraph", "phrase", "premise",
        "sentence1", "question1", "review_text", "review_body", "plot", "synopsis", "story", "lyrics",
    }
)  # fmt: skip
# What a label is about may stand before these, as in airline_sentiment.
_LAST_WORDS = frozenset({"label", "class", "category", "sentiment", "emotion", "intent", "topic", "target"})
# Columns that describe a row, and are neither read nor learned.
_ABOUT_THE_ROW = re.compile(
    r"(.*_)?(id|ids|idx|index|uid|uuid|guid|url|link|date|datetime|time|timestamp|created|created_at|author|user|username|name|"
    r"filename|file|path|source_file|row|no|nr|number|lang|language|split|level_0)|unnamed:.*|",
    re.IGNORECASE,
)

# Texts that are rather the name of a longer one beside them.
_HEADINGS = frozenset({"title", "headline", "subject", "query", "question"})
# Parts of a conversation or of a question: no labels, even where they repeat.
_SPOKEN = frozenset(
    {
        "prompt", "instruction", "input", "output", "completion", "response", "question", "context", "system", "answer",
        "answers", "answer_key", "correct_answer", "correct_option", "ans",
    }
)  # fmt: skip
# Names of a prompt and its completion.
PROMPTS = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("instruction", "output"),
    ("instruction", "response"), ("instruction", "completion"), ("instruction", "answer"), ("question", "answer"),
    ("question", "response"), ("query", "response"), ("query", "answer"), ("input", "output"), ("user", "assistant"),
)  # fmt: skip
# Numbers of these are rather measures than classes, where they are many.
_MEASURES = frozenset({"score", "rating", "grade", "similarity", "similarity_score"})

_MOST_CLASSES = 1_000
_MOST_NUMBERED_CLASSES = 50
_MOST_WORDS_OF_LABEL = 6
_FEWEST_WORDS_OF_TEXT = 2.0
# Beyond this share of other letters than English ones, an English model's pieces are mostly unknown or single letters.
_MOST_FOREIGN_LETTERS = 0.1


def is_named(column: Column, names: Iterable[str]) -> bool:
    """Whether its name is one of these, whatever the case and the separators of its words."""
    return normalize(column.name) in names


def normalize(name: str) -> str:
    """A column's name in lower case, with _ between its words."""
    return re.sub(r"[\s.\-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())).lower()


def is_named_label(column: Column) -> bool:
    """Whether its name says that it is a label."""
    return is_named(column, LABEL_NAMES) or normalize(column.name).rpartition("_")[2] in _LAST_WORDS


def is_about_the_row(column: Column) -> bool:
    """Whether its name says that it describes the row: a number, a date, a link."""
    return _ABOUT_THE_ROW.fullmatch(normalize(column.name)) is not None


def find_texts(table: Survey) -> list[Column]:
    """Columns that could be read as text, the likeliest first: those of a telling name, then those of more words."""
    found = [
        column
        for column in table.columns
        if column.holds(TEXT)
        and column.numbers is None
        and not is_about_the_row(column)
        and (is_named(column, TEXT_NAMES) or column.mean_words >= _FEWEST_WORDS_OF_TEXT)
        and (is_named(column, TEXT_NAMES) or not is_class(column))
    ]
    return sorted(found, key=lambda column: (not is_named(column, TEXT_NAMES - _HEADINGS), -column.mean_words))


def is_class(column: Column) -> bool:
    """Whether its values repeat as the names of classes do."""
    if column.counts is None or not column.holds(TEXT, INTEGER, BOOLEAN):
        return False
    if is_named(column, _SPOKEN) and not column.holds(BOOLEAN):
        return False
    num_classes, is_label = len(column.counts), is_named(column, LABEL_NAMES - _MEASURES)
    if not 2 <= num_classes <= _MOST_CLASSES or column.num_filled < 2 * num_classes:
        return False
    if column.numbers is not None and column.holds(TEXT, INTEGER):
        are_whole = all(number.is_integer() for number in column.numbers)
        return are_whole and (num_classes <= _MOST_NUMBERED_CLASSES or is_label)
    return column.mean_words <= _MOST_WORDS_OF_LABEL


def find_classes(table: Survey) -> list[Column]:
    """Columns that could be a label of classes, those of a telling name first."""
    found = [column for column in table.columns if is_class(column) and not is_about_the_row(column)]
    found = [column for column in found if not any(_names_classes(other, column) for other in found)]
    return sorted(found, key=lambda column: not is_named_label(column))


def _names_classes(names: Column, numbers: Column) -> bool:
    """Whether one column has the names of the classes whose numbers the other one has, as label_text beside label."""
    if not names.holds(TEXT) or names.numbers is not None or numbers.numbers is None:
        return False
    pairs = set(zip(names.values, numbers.values, strict=True))
    is_same = len(pairs) == len({name for name, _ in pairs}) == len({number for _, number in pairs})
    return is_same and names.num_distinct == numbers.num_distinct


def is_alone(table: Survey, column: Column) -> bool:
    """Whether all other columns are empty, or describe the row."""
    return all(other is column or not other.kinds or is_about_the_row(other) for other in table.columns)


def find_pair(table: Survey, pairs: Iterable[Sequence[str]]) -> tuple[Column, Column] | None:
    """The columns of texts that have the names of a pair."""
    named = {normalize(column.name): column for column in table.columns if column.holds(TEXT)}
    return next(((named[one], named[other]) for one, other in pairs if one in named and other in named), None)


def list_unread(table: Survey, read: Iterable[str]) -> list[str]:
    """A remark on the columns that are not read, where there are some."""
    names = set(read)
    unread = [column.name for column in table.columns if column.name not in names]
    return [f"not read: {', '.join(unread)}"] if unread else []


def join_texts(table: Survey, names: Sequence[str]) -> list[str]:
    """The texts of each kept row, those of several columns together."""
    return [" ".join(text for name in names if isinstance(text := row.get(name), str)) for row in table.rows]


def choose_encoders(texts: Iterable[str]) -> Models:
    """Encoders that know the letters of these texts."""
    letters = [letter for text in texts for letter in text[:500] if letter.isalpha()]
    foreign = sum(not letter.isascii() for letter in letters)
    return MULTILINGUAL_ENCODERS if foreign > _MOST_FOREIGN_LETTERS * len(letters) else ENGLISH_ENCODERS
