"""Parameters counted from config.json alone are those of the real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.errors import UncountableModel, UnreadableModel
from onecurve.launcher.facts.shape import build_shape, load_shape
from onecurve.launcher.planning.compute import count_flops
from tests.launcher.conftest import machine, messages
from tests.messages import names

SMALL = {
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


MODELS = [
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
    ("mixtral", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen2", {**SMALL, "num_key_value_heads": 2}),
    ("qwen3", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
]


def make_model(model_type: str, settings: dict[str, int]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **settings, num_labels=5)
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(("model_type", "settings"), MODELS)
def test_counts_are_the_models_own(model_type: str, settings: dict[str, int]) -> None:
    model = make_model(model_type, settings)
    shape = build_shape(model.config.to_dict(), head_outputs=5)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.is_exact


def test_a_vision_models_counts_are_its_own() -> None:
    import torch
    from transformers import AutoModelForImageClassification, ViTConfig

    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    with torch.device("meta"):
        config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
        model = AutoModelForImageClassification.from_config(config)
    shape = build_shape(config.to_dict(), head_outputs=5)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    layer = model.vit.layers[0] if hasattr(model.vit, "layers") else model.vit.encoder.layer[0]
    assert shape.layer_parameters == sum(parameter.numel() for parameter in layer.parameters())


_LLAMA = {**SMALL, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt2", dict(MODELS)["gpt2"]),
        ("gpt2", {**dict(MODELS)["gpt2"], "tie_word_embeddings": False}),
        ("llama", _LLAMA),
        ("llama", {**_LLAMA, "tie_word_embeddings": True}),
        ("mistral", {**_LLAMA, "head_dim": 8}),
        ("qwen3", {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    ],
)
def test_a_language_models_head_is_counted(model_type: str, settings: dict[str, int]) -> None:
    """Once where it has the embeddings' weights. A config.json says of some families only what is not usual."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.tie_weights()
    for config in (model.config.to_dict(), {"model_type": model_type, **settings}):
        shape = build_shape(config, predicts_tokens=True)
        assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_a_head_for_masked_tokens_is_counted(model_type: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    settings = dict(MODELS)[model_type]
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.tie_weights()
    shape = build_shape({"model_type": model_type, **settings}, predicts_tokens=True)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("model_type", "settings"), MODELS)
def test_a_last_layer_is_planned_as_it_is_trained(model_type: str, settings: dict[str, int]) -> None:
    from onecurve.training.models import last_layer

    model = make_model(model_type, settings)
    assert build_shape(model.config.to_dict(), head_outputs=5).reads_first_token == last_layer.install(model)


@pytest.mark.slow
def test_an_unknown_type_is_counted_from_its_weights(tmp_path: Path, tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "new"}), encoding="utf-8")
    assert not load_shape(str(tmp_path)).is_exact
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    shape = load_shape(str(tmp_path))
    assert shape.is_exact
    known = load_shape(str(tiny_model)).num_parameters
    assert shape.num_parameters == known - 2 * 33  # The stored weights have no head yet.


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "new"}', "[]"])
def test_what_is_no_transformer_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UnreadableModel, match=r"config\.json"):
        load_shape(str(tmp_path))


def test_a_token_meets_only_its_experts() -> None:
    settings = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    shape = build_shape({**settings, "model_type": "mixtral"})
    assert shape.idle_parameters == 2 * 3 * 24 * 40
    assert shape.intermediate_size == 2 * 40
    assert count_flops(shape, 1, 0) == 6 * 3 * (shape.layer_parameters - shape.idle_parameters)


@pytest.mark.slow
def test_experts_of_an_unknown_kind_are_counted_from_weights_or_not_at_all(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    import torch
    from safetensors.torch import save_file

    config = {**SMALL, "model_type": "new_moe", "num_key_value_heads": 2, "n_routed_experts": 64}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UncountableModel, match="mixes 64 experts"):
        load_shape(str(tmp_path))
    told = messages(
        {**recipe, "model_name_or_path": str(tmp_path), "tokenizer_name": recipe["model_name_or_path"]}, machine()
    )
    assert any(line.startswith("warning: ") and names(line, "memory", "disk") for line in told)
    save_file({"a": torch.zeros(300, 1000)}, tmp_path / "model.safetensors")
    shape = load_shape(str(tmp_path))
    assert (shape.num_parameters, shape.layer_parameters) == (300_000, (300_000 - 100 * 24) // 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "settings", "num_layers"),
    [
        ("bart", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 100}, 5),
        ("albert", {"hidden_size": 24, "embedding_size": 8, "num_attention_heads": 2, "num_hidden_layers": 6}, 6),
        ("bert", {}, 12),
    ],
)
def test_a_family_that_the_arithmetic_does_not_know_is_counted_from_the_model(
    model_type: str, settings: dict[str, Any], num_layers: int, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    config = {"model_type": model_type, **settings}  # What a config.json lacks is the family's default.
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape = load_shape(str(tmp_path))
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_layers == num_layers
    assert 0 < shape.layer_parameters * (num_layers if model_type != "albert" else 1) < shape.num_parameters
    assert not shape.knows_activations
    told = messages(
        {**recipe, "model_name_or_path": str(tmp_path), "tokenizer_name": recipe["model_name_or_path"]}, machine()
    )
    assert not any("transformer" in line for line in told), "nothing is refused for being unknown"
