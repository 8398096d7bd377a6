"""What goes through a model at once, and what of it an adapter trains, counted as PEFT does."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.memory import count_checkpoint_bytes, estimate_memory
from onecurve.launcher.planning.work import Work, build_work, count_trained_parameters
from onecurve.training.config import build_recipe

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
BERT = BertModel(BertConfig(**SIZES), add_pooling_layer=False)
LLAMA = LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2))


def build(**keys: Any) -> Any:
    return build_recipe({"model_name_or_path": "m", "train_file": "t.csv", "adapter": "lora", **keys})


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("model", "targets"),
    [(BERT, "all-linear"), (LLAMA, "all-linear"), (BERT, ["query", "value"]), (LLAMA, ["q_proj", "down_proj"])],
)
def test_an_adapter_has_as_many_parameters_as_peft_makes(model: Any, targets: Any, use_dora: bool) -> None:
    import copy

    adapted = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(r=5, target_modules=targets, use_dora=use_dora), adapted)
    expected = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    recipe = build(lora_r=5, lora_target_modules=targets, use_dora=use_dora)
    assert count_trained_parameters(recipe, build_shape(model.config.to_dict())) == expected


def test_gradients_moments_and_checkpoints_are_of_the_adapter_alone() -> None:
    shape = build_shape(LLAMA.config.to_dict())
    whole = estimate_memory(shape, "one process", Work(1, 8), 1)
    recipe = build(mixed_precision="bf16", base_dtype="bfloat16")
    work = build_work(recipe, shape, "cuda", 8, 1)
    found, trained = estimate_memory(shape, "one process", work, 1), count_trained_parameters(recipe, shape)
    assert trained is not None
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)
    assert whole.weights == 4 * shape.num_parameters
    assert found.weights == 2 * shape.num_parameters + 2 * trained
    assert count_checkpoint_bytes(shape, trained) == 12 * trained
    quantized = build_work(build(quantization="nf4"), shape, "cuda", 8, 1)
    layers = shape.num_layers * shape.layer_parameters
    exact = 4 * (shape.num_parameters - layers) + 4 * trained
    weights = estimate_memory(shape, "one process", quantized, 1).weights
    assert 0.5 * layers < weights - exact < 0.52 * layers, "half a byte each, and the scales of 64"
