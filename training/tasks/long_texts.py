"""Token sequences that are longer than an example may be: cut, or split into pieces that lose no target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Treatment = Literal["cut", "split"]


def cut_into_examples(num_tokens: int, max_length: int, treatment: Treatment) -> Iterator[slice]:
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
