"""How many tokens texts have: by the model's tokenizer where its files are on this machine, else estimated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onecurve.launcher.facts.model_files import find_config

# English in UTF-8 under the tokenizers of BERT, GPT-2 and Llama. Letters of other scripts have more bytes, and more tokens.
_BYTES_PER_TOKEN = 4.2
_SPECIAL_TOKENS = 2


class Counter:
    """Counts tokens of texts, each text once.

    Attributes:
        is_counted: whether by the tokenizer; else estimated from the number of bytes.
    """

    def __init__(self, tokenizer: str | None) -> None:
        """Read it, if its tokenizer.json is on this machine.

        Args:
            tokenizer: a folder, or a name on the hub, of whose tokenizer.json is read what is in the hub's cache; None to
                estimate.
        """
        path = None if tokenizer is None else find_tokenizer(tokenizer)
        self._backend: Any = None
        if path is not None:
            try:
                from tokenizers import Tokenizer

                self._backend = Tokenizer.from_file(str(path))
                self._backend.no_truncation()
                self._backend.no_padding()
            except Exception:  # The tokenizers package raises bare Exceptions.
                self._backend = None
        self.is_counted = self._backend is not None
        self._known: dict[str, int] = {}

    def count(self, text: str) -> int:
        """Tokens of a text without special ones."""
        if text not in self._known:
            if self._backend is None:
                self._known[text] = max(1, round(len(text.encode()) / _BYTES_PER_TOKEN)) if text else 0
            else:
                self._known[text] = len(self._backend.encode(text, add_special_tokens=False).ids)
        return self._known[text]

    def count_special(self, num_texts: int) -> int:
        """Special tokens around one text, or around two."""
        if self._backend is None:
            return _SPECIAL_TOKENS + (num_texts > 1)
        return int(self._backend.num_special_tokens_to_add(num_texts > 1))


def find_tokenizer(name: str) -> Path | None:
    """The tokenizer.json of a model's folder, or in the hub's cache."""
    folder = Path(name)
    if not folder.is_dir():
        config = find_config(name)
        if config is None:
            return None
        folder = config.parent
    path = folder / "tokenizer.json"
    return path if path.is_file() else None
