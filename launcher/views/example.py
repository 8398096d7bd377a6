"""One prepared example as its tokens, those that are learned marked: in colour, and in brackets that a file keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

Example = Sequence[tuple[str, bool]]
"""Pieces of text, and whether each is a target."""

_OPEN, _CLOSE = "⟦", "⟧"
_BETWEEN_TOKENS = "|"


def format_example(example: Example) -> Text:
    """The tokens in one line, with a bar between two; what is learned stands green in brackets."""
    from rich.text import Text

    text = Text()
    for is_target, pieces in groupby(example, key=lambda piece: piece[1]):
        shown = _BETWEEN_TOKENS.join(piece.replace("\n", "\\n") for piece, _ in pieces)
        text.append(f"{_OPEN}{shown}{_CLOSE}" if is_target else shown, style="green" if is_target else "dim")
    return text
