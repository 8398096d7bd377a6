"""Texts -> tokens, for every task that reads texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onecurve.training.recipe import Recipe


def encode_texts(texts: Sequence[Sequence[str]], tokenizer: Any, recipe: Recipe) -> dict[str, list[list[int]]]:
    """Tokens of texts or pairs of texts, cut to `max_length`, not padded; without the attention mask, which is all ones.

    Args:
        texts: one list of texts, or two of the same length.
    """
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and set(names) <= {"input_ids", "token_type_ids"}:
        # What transformers does in its call, without the offsets and masks that nobody reads.
        backend.no_padding()
        backend.enable_truncation(recipe.max_length, direction=tokenizer.truncation_side)
        encodings = backend.encode_batch_fast(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
        found = {"input_ids": [encoding.ids for encoding in encodings]}
        if "token_type_ids" in names:
            found["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        return found
    encoded = tokenizer(*texts, truncation=True, max_length=recipe.max_length, padding=False)
    return {name: values for name, values in encoded.items() if name != "attention_mask"}
