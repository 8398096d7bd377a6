"""CoNLL files: a word a line with its tags in columns, a blank line behind each sentence. A sentence is a row of lists.

Decided here: the first column is `tokens`, the last `ner_tags`, those between `column_2`, `column_3`, ...; a file of one column
is `tokens` alone. Tabs separate columns if the first word's line has one, else runs of spaces. Lines that begin with -DOCSTART-
and comments (`# key = value`, `# id ...`, `# newdoc`, `# newpar`) are skipped: `#` may be a word. Every line has as many columns
as the first. No other space than the ASCII ones separates anything: words may hold them. A first column that does not hold the
words, as in CoNLL-U, which counts them, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from onecurve.training.data.text_lines import Lines
from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

ConllRow = dict[str, list[str]]

_SENTENCES_PER_TABLE = 4_096
_COMMENT = re.compile(r"#[ \t]*(\S+[ \t]=|(id|newdoc|newpar)\b)")
_DOCUMENT = "-DOCSTART-"
_NUMBER = re.compile(r"[0-9]+([-.][0-9]+)?")
_SENTENCES_LOOKED_AT = 20


def name_columns(width: int) -> list[str]:
    """Names of a file's columns."""
    between = [f"column_{number}" for number in range(2, width)]
    return ["tokens", *between, *(["ner_tags"] if width > 1 else [])]


def iterate_sentences(path: Path) -> Iterator[ConllRow]:
    """Each sentence: for each column the list of its values.

    Raises:
        BadInput: the first column holds no words; or naming the first line that has another number of columns than the first.
    """
    sentences = _read(path)
    first = list(islice(sentences, _SENTENCES_LOOKED_AT))
    _check_first_column(path, [row["tokens"] for row in first], len(first[0]) if first else 0)
    return chain(first, sentences)


def _check_first_column(path: Path, sentences: list[list[str]], width: int) -> None:
    num_words = sum(map(len, sentences))
    if width < 2 or num_words < 3:
        return
    if all(map(_counts, sentences)):
        problem = "counts the words (1, 2, 3), as in CoNLL-U"
    elif len(set(chain.from_iterable(sentences))) == 1:
        problem = f"holds {sentences[0][0]!r} for every word"
    else:
        return
    raise BadInput(
        f"{path}: the first of its {width} columns {problem}; write the words first and their labels last, such as with "
        "`cut -f 2,4`, which keeps the second and the fourth column"
    )


def _counts(words: list[str]) -> bool:
    """Whether they are 1, 2, 3, ...; CoNLL-U has 1-2 and 1.1 among them."""
    numbers = [word for word in words if word.isascii() and word.isdigit()]
    return all(map(_NUMBER.fullmatch, words)) and numbers == [str(number + 1) for number in range(len(numbers))]


def _read(path: Path) -> Iterator[ConllRow]:
    with path.open("rb") as file:
        words: list[list[str]] = []
        width, separator = 0, " "
        lines = Lines(path, file)
        for line in lines:
            text = line.rstrip("\r\n")
            if not text.strip(" \t") or text.startswith(_DOCUMENT):
                yield from _close(words, width)
                words = []
                continue
            if _COMMENT.match(text):
                continue
            if "\r" in text:
                raise BadInput(f"{path}, line {lines.number}: holds a carriage return; save the file with line feeds")
            if not width:
                separator = "\t" if "\t" in text else " "
            cells = text.split("\t") if separator == "\t" else re.split(" +", text.strip(" "))
            width = width or len(cells)
            if len(cells) != width:
                _refuse(path, lines.number, cells, width, separator)
            words.append(cells)
        yield from _close(words, width)


def _close(words: list[list[str]], width: int) -> Iterator[ConllRow]:
    if words:
        yield dict(zip(name_columns(width), map(list, zip(*words, strict=True)), strict=True))


def _refuse(path: Path, number: int, cells: list[str], width: int, separator: str) -> NoReturn:
    named = "tabs" if separator == "\t" else "spaces"
    advice = "is the blank line between two sentences missing, or is it a comment? Remove comments"
    if len(cells) == 1 and "\t" in cells[0]:
        advice = "the first line separates its columns by spaces; write all lines alike"
    raise BadInput(
        f"{path}, line {number}: {len(cells)} columns, separated by {named}, where the first word's line has {width}; {advice}"
    )


def iterate_tables(path: Path) -> Iterator[pa.Table]:
    """The file as tables whose columns are lists of texts.

    Raises:
        BadInput: as `iterate_sentences`.
    """
    import pyarrow as pa

    sentences = iterate_sentences(path)
    while rows := list(islice(sentences, _SENTENCES_PER_TABLE)):
        yield pa.table({name: pa.array([row[name] for row in rows], pa.list_(pa.string())) for name in rows[0]})
