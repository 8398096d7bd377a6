"""What makes a folder of weights a model: its config and its tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any


def save_config_and_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what `from_pretrained` needs beside the weights, as `save_pretrained` of the model and the tokenizer does.

    Args:
        model: of transformers, not prepared.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
