"""Windows hold each word once as their own; words are tokenized as in a text, whatever the tokenizer."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecurve.training.tasks.word_windows import WordTokenizer, cut_into_windows


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 19), st.integers(0, 2**32))
def test_each_word_is_one_windows_own(num_words: int, room: int, overlap: int, seed: int) -> None:
    generator = random.Random(seed)
    sizes = np.array([generator.randint(1, min(room, generator.choice([1, 3, 20]))) for _ in range(num_words)])
    windows = list(cut_into_windows(sizes, room, min(overlap, room - 1)))
    assert [word for window in windows for word in window.own] == list(range(num_words))
    for window in windows:
        assert len(window.own)
        assert set(window.own) <= set(window.words)
        assert sizes[window.words.start : window.words.stop].sum() <= room
    for before, after in pairwise(windows):
        assert sizes[after.words.start : before.words.stop].sum() <= min(overlap, room - 1)


def test_a_word_belongs_to_the_window_that_shows_more_around_it() -> None:
    windows = list(cut_into_windows(np.ones(20, dtype=int), 12, 6))
    assert [(window.words, window.own) for window in windows] == [
        (range(12), range(9)),
        (range(6, 18), range(9, 15)),
        (range(12, 20), range(15, 20)),
    ]


WORDS = ["London", "is", "unbelievably", "large,", "well-kept", "Straße", "3.14", "U.S."]


def build_tokenizer(kind: str, folder: Path, demo: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind == "wordpiece":
        return AutoTokenizer.from_pretrained(demo / "model")
    if kind == "bytes":  # A space is part of the token behind it.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(
            models.BPE({**{c: n for n, c in enumerate(alphabet)}, "<s>": 256, "</s>": 257, "Ġi": 258}, [("Ġ", "i")])
        )
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        core.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 256), ("</s>", 257)])
    else:
        letters = sorted({letter for word in WORDS for letter in word} | {"a"})
        pieces = [
            ("<unk>", 0.0),
            ("<s>", 0.0),
            ("▁", -3.0),
            ("▁is", -1.0),
            ("▁un", -1.0),
            *((c, -5.0) for c in letters),
        ]
        core = Tokenizer(models.Unigram(pieces, unk_id=0))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.post_processor = processors.TemplateProcessing("$A <s>", None, [("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>", pad_token="<s>").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "pieces"])
def test_words_are_tokenized_as_transformers_does(kind: str, tmp_path: Path, demo: Path) -> None:
    tokenizer = build_tokenizer(kind, tmp_path, demo)
    words = WordTokenizer(tokenizer)
    [pieces] = words.tokenize([WORDS])
    expected = tokenizer(WORDS, is_split_into_words=True)
    assert [*words.before, *(token for word in pieces for token in word), *words.after] == expected["input_ids"]
    of_word = [word for word in expected.word_ids() if word is not None]
    assert [len(tokens) for tokens in pieces] == [of_word.count(number) for number in range(len(WORDS))]


def test_a_byte_level_tokenizer_reads_a_word_with_the_space_before_it(tmp_path: Path, demo: Path) -> None:
    """As with add_prefix_space, which its saved settings may lack."""
    with_space = build_tokenizer("bytes", tmp_path / "a", demo)
    without = build_tokenizer("bytes", tmp_path / "b", demo)
    from tokenizers import pre_tokenizers

    without.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert without("is")["input_ids"] != with_space("is")["input_ids"]
    assert WordTokenizer(without).tokenize([WORDS]) == WordTokenizer(with_space).tokenize([WORDS])
    assert WordTokenizer(without).tokenize([["is"]])[0][0][0] == 258
