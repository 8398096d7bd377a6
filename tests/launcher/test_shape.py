"""Parameters counted from config.json alone are those of the real models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import UnreadableModel
from launcher.shape import build_shape, load_shape

SMALL = {
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bert", SMALL),
        ("roberta", SMALL),
        ("xlm-roberta", SMALL),
        ("camembert", SMALL),
        ("electra", {**SMALL, "embedding_size": 16}),
        ("distilbert", {"vocab_size": 100, "dim": 24, "hidden_dim": 40, "n_layers": 3, "n_heads": 4}),
        ("gpt2", {"vocab_size": 100, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}),
        ("modernbert", {**SMALL, "pad_token_id": 0}),
        ("llama", {**SMALL, "num_key_value_heads": 2}),
        ("llama", {**SMALL, "attention_bias": True}),
        ("mistral", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
        ("qwen2", {**SMALL, "num_key_value_heads": 2}),
        ("qwen3", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
    ],
)
def test_counts_are_the_models_own(model_type: str, settings: dict[str, int]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(model_type, **settings, num_labels=5)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    shape = build_shape(config.to_dict(), num_labels=5)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.is_exact


def test_an_unknown_type_is_counted_from_its_weights(tmp_path: Path, tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "new"}), encoding="utf-8")
    assert not load_shape(str(tmp_path), 2).is_exact
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    shape = load_shape(str(tmp_path), 2)
    assert shape.is_exact
    known = load_shape(str(tiny_model), 2).num_parameters
    assert shape.num_parameters == known - 2 * 33  # The stored weights have no head yet.


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "bert"}', "[]"])
def test_what_is_no_transformer_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UnreadableModel, match=r"config\.json"):
        load_shape(str(tmp_path), 2)
