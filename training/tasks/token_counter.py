"""How many tokens rows have, before they are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class TokenCounter(Protocol):
    """How many tokens texts have, by a model's tokenizer or by an estimate."""

    def count(self, text: str) -> int:
        """Tokens of a text alone."""

    def count_special(self, num_texts: int) -> int:
        """Tokens that are put around one text, or around two."""


def estimate_text(values: Sequence[Any], counter: TokenCounter, max_length: int) -> list[list[int]]:
    """One example with one sequence: all texts of a row behind each other, cut."""
    texts = [value for value in values if isinstance(value, str)]
    return [[min(sum(map(counter.count, texts)) + counter.count_special(len(texts)), max_length)]]
