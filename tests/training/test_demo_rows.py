"""Rows of the demos: what is read from a dictionary, and what a choice may hold."""

from __future__ import annotations

import random

from onecurve.training.recipes.build_choices_demo import build_rows
from onecurve.training.recipes.build_phonemes_demo import read_words


def test_words_have_their_first_pronunciation_without_stress() -> None:
    lines = [
        "CAT  K AE1 T",
        "CAT'S  K AE1 T S",
        "READ  R EH1 D",
        "READ(1)  R IY1 D",
        "OF  AH1 V",
        "ABBREVIATIONALLY  AH0",
    ]
    assert read_words("\n".join(lines)) == [("cat", "K AE T"), ("read", "R EH D")]


def test_a_definition_stands_once_among_its_choices_at_the_labels_place() -> None:
    nouns = [(f"noun{number}", f"definition {number}") for number in range(20)]
    rows = build_rows(nouns, random.Random(0))
    assert [row["choices"][row["label"]] for row in rows] == [definition for _, definition in nouns]
    assert {len(set(row["choices"])) for row in rows} == {4}
    assert {row["label"] for row in rows} == {0, 1, 2, 3}
