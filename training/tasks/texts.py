"""Texts -> tokens, for every task that reads texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from onecurve.training.errors import BadInput
from onecurve.training.recipe import Recipe
from onecurve.training.tasks.base import Rows, Task
from onecurve.training.tasks.special_tokens import find_leaks, find_special_tokens, replace_leaks


def find_text_problem(text: Any, name: str) -> str | None:
    """What is wrong with a text of one row; None where nothing is."""
    if text is not None and not isinstance(text, str):
        return f"text column {name!r} holds {type(text).__name__} {text!r:.40}, not text"
    if not text or not text.strip():
        return f"text column {name!r} is empty; fill or remove the row"
    return None


def check_texts(rows: Rows, columns: Sequence[str]) -> None:
    """Refuse columns that hold no text, or an empty one.

    Raises:
        BadInput: naming the column, and the first row at fault.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in columns:
        column = rows.table.column(name)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise BadInput(f"{rows.origin}: text column {name!r} must hold text, it holds {column.type}")
        start = 0
        for chunk in column.chunks:  # A whole column may not fit into memory.
            place = pc.index(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(chunk), ""), True), True).as_py()
            if place >= 0:
                rows.refuse(start + place, f"text column {name!r} is empty; fill or remove the row")
            start += len(chunk)


def encode_texts(texts: Sequence[Sequence[str]], tokenizer: Any, recipe: Recipe) -> dict[str, list[list[int]]]:
    """Tokens of texts or pairs of texts, cut to `max_length`, not padded; without the attention mask, which is all ones.

    Nothing in a text becomes a special token: special_tokens.py.

    Args:
        texts: one list of texts, or two of the same length.
    """
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    leaks = find_leaks(tokenizer)
    if backend is not None and set(names) <= {"input_ids", "token_type_ids"}:
        # What transformers does in its call, without the offsets and masks, which are not needed.
        backend.no_padding()
        backend.enable_truncation(recipe.max_length, direction=tokenizer.truncation_side)
        backend.encode_special_tokens = True
        encodings = backend.encode_batch_fast(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
        found = {"input_ids": [encoding.ids for encoding in encodings]}
        if leaks:
            masks = [encoding.special_tokens_mask for encoding in encodings]
            found["input_ids"] = [replace_leaks(*pair, leaks) for pair in zip(found["input_ids"], masks, strict=True)]
        if "token_type_ids" in names:
            found["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        return found
    encoded = tokenizer(
        *texts, truncation=True, max_length=recipe.max_length, padding=False, split_special_tokens=True,
        return_special_tokens_mask=bool(leaks),
    )  # fmt: skip
    if leaks:
        pairs = zip(encoded["input_ids"], encoded.pop("special_tokens_mask"), strict=True)
        encoded["input_ids"] = [replace_leaks(*pair, leaks) for pair in pairs]
    return {name: values for name, values in encoded.items() if name != "attention_mask"}


def note_special_tokens(
    task: Task,
    rows: Rows,
    columns: Sequence[str],
    tokenizer: Any,
    advice: str = "A token that texts may use is added to the tokenizer with add_tokens",
) -> None:
    """Note the first row whose text, or list of words, writes one of the tokenizer's special tokens."""
    if "special tokens" in task.notes:
        return
    pattern = re.compile("|".join(map(re.escape, find_special_tokens(tokenizer))))
    for name in columns:
        for position, text in enumerate(rows.values(name)):
            if (found := pattern.search(text if isinstance(text, str) else " ".join(text or ()))) is not None:
                task.notes["special tokens"] = (
                    f"{rows.origin}, row {rows.numbers[position] + 1}: the text column {name!r} has {found[0]!r}, a special "
                    "token of this tokenizer. Texts are read as plain text, here and in all rows: it is split like other "
                    f"words. {advice}"
                )
                return
