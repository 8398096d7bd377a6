"""CoNLL files are read as they are written: a sentence a row, and a line that does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onecurve.training.data.sources import find_files
from onecurve.training.data.tables import count_rows, read_chunks, read_head, read_table
from onecurve.training.errors import BadInput
from tests.messages import naming


def read(content: str | bytes, folder: Path) -> list[dict[str, Any]]:
    """Rows of both readers, which agree."""
    path = folder / "rows.conll"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    find_files("train_file", [str(path)])
    rows = [row for chunk in read_chunks(path) for row in chunk]
    assert read_table([path], folder / "scratch").to_pylist() == rows
    assert count_rows(path) == len(rows)
    assert read_head(path, 1).rows == rows[:1]
    return rows


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a X\nb Y\n\nc Z\n", [("ab", "XY"), ("c", "Z")]),
        ("a X\nb Y\n\n\n \t\nc Z", [("ab", "XY"), ("c", "Z")]),
        ("\n\na X\r\nb Y\r\n\r\nc Z\r\n", [("ab", "XY"), ("c", "Z")]),
        ("\ufeffa   X\nb Y\n", [("ab", "XY")]),
        ("a\tX\nb\tY\n", [("ab", "XY")]),
        ("a X \n b Y\n", [("ab", "XY")]),
        ("-DOCSTART- O\n\na X\n-DOCSTART- O\nb Y\n", [("a", "X"), ("b", "Y")]),
        ("# sent_id = 1\n# newdoc\na X\n# text = a b\nb Y\n", [("ab", "XY")]),
        ("# X\nb Y\n", [("#b", "XY")]),
        ("a X\n# Y\n", [("a#", "XY")]),
    ],
)
def test_sentences_as_they_are_written(content: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    assert [("".join(row["tokens"]), "".join(row["ner_tags"])) for row in read(content, tmp_path)] == expected


@pytest.mark.parametrize(
    ("content", "needed"),
    [
        ("1\tThe\tDET\n2\tdog\tNOUN\n\n1\tIt\tPRON\n", ("3 columns", "1", "2", "3")),
        ("1-2\tzum\t_\n1\tzu\tADP\n2\tdem\tDET\n2.1\t_\t_\n3\tHaus\tNOUN\n", ("3 columns", "CoNLL-U")),
        ("bc/cctv 0 0 In IN\nbc/cctv 0 1 the DT\n\nbc/cctv 0 0 It PRP\n", ("5 columns", "'bc/cctv'")),
    ],
)
def test_a_first_column_without_words_is_refused(content: str, needed: tuple[str, ...], tmp_path: Path) -> None:
    """Word numbers were learned as words, without a word."""
    with pytest.raises(BadInput, match=naming("rows.conll", *needed)):
        read(content, tmp_path)


@pytest.mark.parametrize("content", ["1 X\n2 Y\n\nc Z\n", "1 X\n1 Y\n\n2 Z\n", "1 X\n2 X\n", "1\n2\n3\n"])
def test_numbers_may_be_words(content: str, tmp_path: Path) -> None:
    assert [word for row in read(content, tmp_path) for word in row["tokens"]] == [
        line.split()[0] for line in content.splitlines() if line
    ]


def test_columns_have_names_by_their_place(tmp_path: Path) -> None:
    assert read("a\nb\n", tmp_path) == [{"tokens": ["a", "b"]}]
    (tmp_path / "scratch").rename(tmp_path / "before")
    row = {"tokens": ["EU"], "column_2": ["NNP"], "column_3": ["B-NP"], "ner_tags": ["B-ORG"]}
    assert read("EU NNP B-NP B-ORG\n", tmp_path) == [row]


def test_only_tabs_and_spaces_separate(tmp_path: Path) -> None:
    """Python would also split a word at these."""
    for word in ("New\u00a0York", "a\u3000b", "a\u2028b", "a\x85b", "a\x0cb"):
        folder = tmp_path / word.encode().hex()
        folder.mkdir()
        assert read(f"{word} X\nb Y\n", folder)[0]["tokens"] == [word, "b"]
    assert read("New York\tX\nb\tY\n", tmp_path)[0]["tokens"] == ["New York", "b"]


def test_a_sentence_is_whole_however_many_there_are(tmp_path: Path) -> None:
    rows = read("\n\n".join(f"word{number} X\nb Y" for number in range(5000)), tmp_path)
    assert [row["tokens"] for row in rows] == [[f"word{number}", "b"] for number in range(5000)]


@pytest.mark.parametrize(
    ("content", "needed"),
    [
        ("a X\nb\n", ("line 2", "1 columns", "has 2")),
        ("a X\n\nb Y Z\n", ("line 3", "3 columns", "has 2")),
        ("a X\nb\tY\n", ("line 2", "1 columns")),
        ("a\tX\nb Y\n", ("line 2", "1 columns")),
        ("a X\n# a comment of words\n", ("line 2", "5 columns")),
        (b"a X\ncaf\xe9 Y\n", ("line 2", "0xe9")),
        ("a X\nb\0 Y\n", ("line 2",)),
        ("a X\rb Y\r", ("line 1",)),
    ],
)
def test_a_wrong_line_is_refused(content: str | bytes, needed: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=naming("rows.conll", *needed)):
        read(content, tmp_path)


def test_a_text_file_is_refused_with_the_name_to_give_it(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a X\n")
    with pytest.raises(BadInput, match=naming("train_file", ".conll")):
        find_files("train_file", [str(tmp_path / "rows.txt")])
