"""The task's tokens are those of the tokenizer's own call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from onecurve.training.config import load_recipe
from onecurve.training.tasks.texts import encode_texts
from tests.conftest import DEMO

TEXTS = ["One.", "A text of several words, with a comma; and more of them.", "naïve café 東京 🙂 " * 20, "x " * 300]


@pytest.mark.parametrize("pair", [None, "second"], ids=["one text", "pairs"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [8, 128])
def test_tokens_are_those_of_the_tokenizers_call(demo: Path, pair: str | None, side: str, max_length: int) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO / "model", truncation_side=side)
    settings = {"model_name_or_path": "none", "train_file": "none", "max_length": str(max_length)}
    recipe = load_recipe(None, settings | ({"text_pair_column": pair} if pair else {})).recipe
    columns = {"text": TEXTS, **({"second": TEXTS[::-1]} if pair else {})}
    found = encode_texts(list(columns.values()), tokenizer, recipe)
    expected = tokenizer(*columns.values(), truncation=True, max_length=max_length, padding=False)
    assert found == {name: expected[name] for name in expected if name != "attention_mask"}
    assert max(map(len, found["input_ids"])) == max_length
