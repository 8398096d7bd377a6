"""Parts of a text -> parts of its tokens, proved: a part that begins or ends inside a token has none. Long ones are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import Any, Literal

from onecurve.training.tasks.special_tokens import GUARD

Span = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """How special tokens come into the tokens of a text.

    Attributes:
        adds: whether the tokenizer puts its own before and behind.
        splits: whether those that the text writes are read as plain text.
    """

    adds: bool
    splits: bool


PLAIN = Reading(adds=True, splits=True)
"""What users wrote."""

RENDERED = Reading(adds=True, splits=False)
"""What users wrote with special tokens, such as chats that were rendered before."""

TEMPLATE = Reading(adds=False, splits=False)
"""What a chat template wrote: all special tokens but those that are guarded."""


def tokenize_parts(
    tokenizer: Any, texts: Sequence[str], spans_of_texts: Sequence[Sequence[Span]], reading: Reading
) -> list[tuple[list[int], list[Span] | None]]:
    """Tokens of each text, and for each of its parts the tokens that it consists of.

    A part stands at the same tokens in the text as where the text up to it, and up to its end, is tokenized alone; that is
    what makes the prompt of a generation the beginning of the example that was trained. Where no token sequence has a
    border there, None stands for the parts.

    Args:
        spans_of_texts: of each text the characters of its parts, ascending and apart.
    """
    tokens_of_texts = _tokenize(tokenizer, texts, reading)
    borders = [list(chain.from_iterable(spans)) for spans in spans_of_texts]
    # All pieces between borders, each tokenized once. Where they add up to the whole, the borders are between tokens.
    cuts = [[0, *inner, len(text)] for text, inner in zip(texts, borders, strict=True)]
    firsts = [text[: places[1]] for text, places in zip(texts, cuts, strict=True)]
    others = [[text[a:b] for a, b in pairwise(places[1:])] for text, places in zip(texts, cuts, strict=True)]
    of_firsts = _tokenize(tokenizer, firsts, reading)
    of_others = iter(_tokenize(tokenizer, list(chain.from_iterable(others)), replace(reading, adds=False)))
    found: list[tuple[list[int], list[Span] | None]] = []
    for text, tokens, inner, first, rest in zip(texts, tokens_of_texts, borders, of_firsts, others, strict=True):
        pieces = [first, *(next(of_others) for _ in rest)]
        ends: list[int] | None
        if list(chain.from_iterable(pieces)) == tokens:
            ends = _accumulate(map(len, pieces))[: len(inner)]
        else:
            ends = _find_ends(tokenizer, text, tokens, inner, reading)
        found.append((tokens, None if ends is None else list(zip(ends[::2], ends[1::2], strict=True))))
    return found


def _find_ends(
    tokenizer: Any, text: str, tokens: list[int], borders: Sequence[int], reading: Reading
) -> list[int] | None:
    """How many tokens stand before each border; None where the text up to one has other tokens than the whole begins with."""
    beginnings = _tokenize(tokenizer, [text[:border] for border in borders], reading)
    if any(beginning != tokens[: len(beginning)] for beginning in beginnings):
        return None
    return [len(beginning) for beginning in beginnings]


def _tokenize(tokenizer: Any, texts: Sequence[str], reading: Reading) -> list[list[int]]:
    # Each guard parts a special token that a user wrote, so the pieces between guards hold none but the template's.
    pieces_of_texts = [text.split(GUARD) if not reading.splits else [text] for text in texts]
    pieces = list(chain.from_iterable(pieces_of_texts))
    if not pieces:
        return []
    found = iter(
        tokenizer(
            pieces,
            add_special_tokens=reading.adds,
            split_special_tokens=reading.splits,
            padding=False,
            truncation=False,
            return_attention_mask=False,
        )["input_ids"]
    )
    return [list(chain.from_iterable(islice(found, len(pieces)))) for pieces in pieces_of_texts]


def _accumulate(lengths: Any) -> list[int]:
    total, sums = 0, []
    for length in lengths:
        total += length
        sums.append(total)
    return sums


def cut_into_examples(num_tokens: int, max_length: int, treatment: Literal["cut", "split"]) -> Iterator[slice]:
    """Which tokens of a sequence go into which example.

    "cut" keeps the first `max_length` tokens. "split" makes pieces of at most `max_length` tokens; each begins with the last
    token of the piece before it. A model predicts no first token, so each token but the very first is predicted once.

    Args:
        num_tokens: of the whole sequence, at least 1.
        max_length: most tokens of an example, at least 2.
    """
    yield slice(0, min(num_tokens, max_length))
    if treatment == "split":
        for start in range(max_length - 1, num_tokens - 1, max_length - 1):
            yield slice(start, min(start + max_length, num_tokens))
