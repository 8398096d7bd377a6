"""Words -> tokens, and rows that are too long for the model -> windows that overlap; each word belongs to one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecurve.training.tasks.base import NO_TARGET
from onecurve.training.tasks.special_tokens import find_leaks, replace_leaks

Array = NDArray[Any]

# Of a token at which no word is predicted.
NO_WORD = -1

# Words that are kept with their tokens; more than a language has.
_MOST_KNOWN = 500_000

# Any word that a tokenizer of any language and size has tokens for.
_ANY_WORD = "a"


class WordTokenizer:
    """The tokens of words, each tokenized as a word inside a text; and what the tokenizer puts around a text.

    Attributes:
        before, after: special tokens at the ends of a text.
        token_types: of `before`, of the text and of `after`; None if the model reads none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._leaks = tokenizer, find_leaks(tokenizer)
        encoded = tokenizer(_ANY_WORD, return_special_tokens_mask=True, split_special_tokens=True)
        of_text = [place for place, is_special in enumerate(encoded["special_tokens_mask"]) if not is_special]
        tokens = encoded["input_ids"]
        self.before, self.after = tokens[: of_text[0]], tokens[of_text[-1] + 1 :]
        self.token_types: tuple[list[int], int, list[int]] | None = None
        if "token_type_ids" in tokenizer.model_input_names:
            types = encoded["token_type_ids"]
            self.token_types = types[: of_text[0]], types[of_text[0]], types[of_text[-1] + 1 :]
        # Byte-level tokenizers keep the space before a word in the word's first token, and only the text's first word has none.
        alone, spaced, twice = self._tokenize([_ANY_WORD, f" {_ANY_WORD}", f"{_ANY_WORD} {_ANY_WORD}"])
        self._space = " " if twice != alone + alone and twice == alone + spaced else ""
        self._known: dict[str, list[int]] = {}

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )["input_ids"]
        return [replace_leaks(tokens, [0] * len(tokens), self._leaks) for tokens in found] if self._leaks else found

    def tokenize(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """For each row the tokens of each of its words; none where the tokenizer removes all of a word's characters."""
        if len(self._known) > _MOST_KNOWN:
            self._known = {}
        new = [word for word in dict.fromkeys(chain.from_iterable(rows)) if word not in self._known]
        if new:
            self._known.update(zip(new, self._tokenize([self._space + word for word in new]), strict=True))
        return [[self._known[word] for word in row] for row in rows]


@dataclass(frozen=True)
class Window:
    """A part of a row's words that goes through the model at once.

    Attributes:
        words: those that the model sees.
        own: those of them whose labels are learned and predicted here; the others are context.
    """

    words: range
    own: range


def cut_into_windows(sizes: Array, room: int, overlap: int) -> Iterator[Window]:
    """Windows of whole words, as few as the overlap allows. A word in two windows belongs to the one with more context.

    Args:
        sizes: [words] tokens of each, from 1 to `room`.
        room: most tokens of a window.
        overlap: most tokens that a window shares with the one before it.
    """
    ends = np.cumsum(sizes)
    starts = ends - sizes
    first, own = 0, 0
    while True:
        last = int(np.searchsorted(ends, starts[first] + room, side="right"))
        if last == len(sizes):
            yield Window(range(first, last), range(own, last))
            return
        # The next window begins with words that fit into the overlap, and has room for a word more than this one had.
        following = max(
            int(np.searchsorted(starts, ends[last - 1] - overlap)),
            int(np.searchsorted(starts, ends[last] - room)),
            first + 1,
        )
        # What is left of a word in the next window, and what is right of it in this one: half of the shared tokens at least.
        middle = (starts[following] + ends[last - 1]) / 2 if following < last else ends[last - 1]
        border = int(np.searchsorted((starts[following:last] + ends[following:last]) / 2, middle)) + following
        if border > own:
            yield Window(range(first, last), range(own, border))
        first, own = following, border


def build_features(
    window: Window,
    pieces: Sequence[list[int]],
    template: WordTokenizer,
    labels: Sequence[int] | None = None,
    inner: Sequence[int] | None = None,
) -> dict[str, list[int]]:
    """What the model is given of a window: its tokens, which word each begins, if it is the window's own; and targets.

    Args:
        pieces: [words] tokens of each word of the row.
        labels: [words] the label of each; None without targets.
        inner: [labels] the label of a word's further tokens; None if these have no target.
    """
    assert all(pieces), "each word has a token"
    tokens: list[int] = []
    begins: list[int] = []
    targets: list[int] = []
    for word in window.words:
        further = len(pieces[word]) - 1
        is_own = word in window.own
        tokens += pieces[word]
        begins += [word if is_own else NO_WORD, *[NO_WORD] * further]
        if labels is not None:
            label = labels[word] if is_own else NO_TARGET
            targets += [label, *[inner[label] if is_own and inner is not None else NO_TARGET] * further]
    ends = len(template.before), len(template.after)
    features = {
        "input_ids": [*template.before, *tokens, *template.after],
        "word": [*[NO_WORD] * ends[0], *begins, *[NO_WORD] * ends[1]],
    }
    if template.token_types is not None:
        before, text, after = template.token_types
        features["token_type_ids"] = [*before, *[text] * len(tokens), *after]
    if labels is not None:
        features["labels"] = [*[NO_TARGET] * ends[0], *targets, *[NO_TARGET] * ends[1]]
    return features
