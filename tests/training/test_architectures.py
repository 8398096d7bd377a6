"""How many tokens a model takes is what its own position embeddings can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from onecurve.training.architectures import count_positions

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 20,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("bert", 20), ("roberta", 18), ("camembert", 18), ("xlm-roberta", 18), ("mpnet", 18), ("electra", 20)],
)
def test_the_last_position_works_and_one_more_does_not(kind: str, expected: int) -> None:
    config = AutoConfig.for_model(kind, **SMALL)
    assert count_positions(config.to_dict()) == expected
    model = AutoModelForSequenceClassification.from_config(config)
    model(input_ids=torch.full((1, expected), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, expected + 1), 7))


@pytest.mark.parametrize("kind", ["t5", "xlnet", "umt5"])
def test_relative_positions_have_no_limit(kind: str) -> None:
    assert count_positions(AutoConfig.for_model(kind).to_dict()) is None
