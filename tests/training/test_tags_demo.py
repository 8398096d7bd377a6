"""Tags of the Brown corpus keep what a word is, and lose where it stands."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "training" / "recipes" / "build_tags_demo.py"))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("The/at Fulton/np-tl", [("The", "AT"), ("Fulton", "NP")]),
        ("He's/pps+bez won't/md* 1/2/cd", [("He's", "PPS"), ("won't", "MD"), ("1/2", "CD")]),
        ("not/* --/-- ./.-hl de/fw-in-tl", [("not", "*"), ("--", "--"), (".", "."), ("de", "IN")]),
        ("his/pp$ whose/wp$-tl ``/`` ''/''", [("his", "PP$"), ("whose", "WP$"), ("``", "``"), ("''", "''")]),
    ],
)
def test_a_tag_says_what_a_word_is(written: str, expected: list[tuple[str, str]]) -> None:
    assert list(SCRIPT["read_sentences"](f"\n\t{written}\n \n")) == [expected]
