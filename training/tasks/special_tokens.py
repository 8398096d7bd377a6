"""Keeps what users write from becoming a special token: `</s>` in a review is four characters, not the end of the text.

`split_special_tokens` of transformers makes most tokenizers read them as plain text. But where the model of a tokenizer
has them among its own pieces (Unigram, as in T5 and XLNet), it finds them again: such leaks are replaced afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GUARD = "\ufdd0"
"""Stands inside a special token that a user wrote, until the text is tokenized. Unicode keeps it out of all texts."""

_ATTRIBUTE = "_onecurve_leaks"


def split_special_tokens(tokenizer: Any) -> None:
    """Let a tokenizer read special tokens in texts as plain text, and save that with it: whoever loads it does the same."""
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.backend_tokenizer.encode_special_tokens = True


def read_special_tokens(tokenizer: Any) -> None:
    """Undo `split_special_tokens`, for a tokenizer of chats: a template writes special tokens, and is guarded text by text."""
    tokenizer.split_special_tokens = False
    tokenizer.init_kwargs.pop("split_special_tokens", None)
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.backend_tokenizer.encode_special_tokens = False


def guard(value: Any, tokens: Sequence[str]) -> Any:
    """A value with every special token in its texts, at any depth, parted by `GUARD`.

    Args:
        tokens: the special tokens as texts write them, longest first.
    """
    if isinstance(value, dict):
        return {key: guard(inner, tokens) for key, inner in value.items()}
    if isinstance(value, list):
        return [guard(inner, tokens) for inner in value]
    if isinstance(value, str):
        for token in tokens:
            value = value.replace(token, token[0] + GUARD + token[1:])
    return value


def find_special_tokens(tokenizer: Any) -> list[str]:
    """The special tokens as texts would write them, longest first."""
    return sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)


def find_leaks(tokenizer: Any) -> Mapping[int, int | None]:
    """Numbers of special tokens that the tokenizer finds in plain text all the same, each with the number to put instead.

    That is the one of the unknown token; None where there is none: the token is left out.
    """
    known: dict[int, int | None] | None = getattr(tokenizer, _ATTRIBUTE, None)
    if known is None:
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        texts = [text for token in find_special_tokens(tokenizer) for text in (token, f"a {token} a", f"a{token}a")]
        found = {
            number
            for text in texts
            for number in tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        }
        known = dict.fromkeys(found & special, tokenizer.unk_token_id)
        setattr(tokenizer, _ATTRIBUTE, known)
    return known


def replace_leaks(tokens: Sequence[int], is_template: Sequence[int], leaks: Mapping[int, int | None]) -> list[int]:
    """The tokens without leaks.

    Args:
        is_template: of each token 1 where the tokenizer itself has put it, as at the ends of a text.
    """
    replaced = (token if is_own else leaks.get(token, token) for token, is_own in zip(tokens, is_template, strict=True))
    return [token for token in replaced if token is not None]
