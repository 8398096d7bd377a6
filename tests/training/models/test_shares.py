"""Each process reads its part of a pretrained model: together they are the model that one process would load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from onecurve.training.models.shares import Cut, Shares, is_reserved, reserve
from onecurve.training.models.tensor_files import TensorFiles

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = GPT2Config(vocab_size=50, n_embd=12, n_layer=2, n_head=2, n_positions=32)
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=1)
MIXTRAL = MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3)
# name: (config, class that saves, class that loads)
MODELS: dict[str, tuple[Any, Any, Any]] = {
    "a new head": (BertConfig(**SMALL, num_labels=3), AutoModelForCausalLM, AutoModelForSequenceClassification),
    "tied": (GPT2, AutoModelForCausalLM, AutoModelForCausalLM),
    "an own head": (LLAMA, AutoModelForCausalLM, AutoModelForCausalLM),
    "merged experts": (MIXTRAL, AutoModelForCausalLM, AutoModelForCausalLM),
}


def save(folder: Path, name: str, dtype: torch.dtype) -> Callable[[], Any]:
    """Save a model with random weights; returns what loads it in float32."""
    config, saver, loader = MODELS[name]
    torch.manual_seed(1)
    saver.from_config(config).to(dtype).save_pretrained(folder)

    def load() -> Any:
        set_seed(7)
        return loader.from_pretrained(folder, dtype=torch.float32, ignore_mismatched_sizes=True)

    return load


def join(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts).float().view(like.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_are_the_whole_model(tmp_path: Path, name: str, is_flat: bool, dtype: torch.dtype) -> None:
    load = save(tmp_path, name, dtype)
    whole = load()
    shares = [Shares(Cut(rank, 3, is_flat)) for rank in range(3)]
    models = [each.load(load) for each in shares]
    assert shares[0].parts
    for model, own in zip(models, shares, strict=True):
        assert model.dtype == torch.float32
        assert dict(model.named_buffers()).keys() == dict(whole.named_buffers()).keys()
        for key, buffer in whole.named_buffers():
            assert torch.equal(model.get_buffer(key), buffer)
        for key, parameter in model.named_parameters():
            assert parameter.shape == whole.get_parameter(key).shape
            assert parameter.requires_grad
            if key not in own.parts:  # A new weight: the same on each process.
                assert torch.equal(parameter, whole.get_parameter(key)), key
                assert not is_reserved(parameter)
            else:
                assert is_reserved(parameter)
    for key in shares[0].parts:
        expected = whole.get_parameter(key)
        assert torch.equal(join([own.parts[key] for own in shares], expected), expected), key
    new = {key for key, _ in whole.named_parameters()} - shares[0].parts.keys()
    assert {key.split(".")[0] for key in new} == ({"classifier", "bert"} if name == "a new head" else set())


def test_tied_weights_that_differ_in_the_file_are_not_tied(tmp_path: Path) -> None:
    """As without shares; transformers compares them when both are in the file."""
    load = save(tmp_path, "tied", torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    for shift in (0, 1):
        weights["lm_head.weight"] = weights["transformer.wte.weight"] + shift
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        whole, shares = load(), Shares(Cut(0, 2, is_flat=False))
        model = shares.load(load)
        assert (model.lm_head.weight is model.transformer.wte.weight) == (shift == 0)
        assert [key for key, _ in model.named_parameters()] == [key for key, _ in whole.named_parameters()]
        assert ("lm_head.weight" in shares.parts) == (shift == 1)


def test_a_head_of_another_size_is_new_on_every_process(tmp_path: Path) -> None:
    save(tmp_path, "a new head", torch.float32)
    AutoModelForSequenceClassification.from_config(BertConfig(**SMALL, num_labels=3)).save_pretrained(tmp_path)

    def load() -> Any:
        set_seed(7)
        return AutoModelForSequenceClassification.from_pretrained(
            tmp_path, config=BertConfig(**SMALL, num_labels=5), dtype=torch.float32, ignore_mismatched_sizes=True
        )

    shares = Shares(Cut(1, 2, is_flat=True))
    model = shares.load(load)
    assert torch.equal(model.classifier.weight, load().classifier.weight)
    assert "classifier.weight" not in shares.parts
    assert "bert.pooler.dense.weight" in shares.parts


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (7,), (1, 6)])
def test_a_part_of_a_file_is_that_of_the_tensor(tmp_path: Path, shape: tuple[int, ...], is_flat: bool) -> None:
    tensor = torch.randn(shape)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    with TensorFiles(tmp_path / "model.safetensors") as file:
        parts = [Cut(rank, 3, is_flat).read(file, "a") for rank in range(3)]
    assert all(torch.equal(part, Cut(rank, 3, is_flat).cut(tensor)) for rank, part in enumerate(parts))
    assert torch.equal(torch.cat(parts), tensor.flatten() if is_flat else tensor)


def test_reserved_memory_is_known_while_it_is_used() -> None:
    tensor = reserve(torch.Size((3, 4)), torch.float32)
    assert torch.equal(tensor, torch.zeros(3, 4))
    assert is_reserved(torch.nn.Parameter(tensor).detach())
    assert not is_reserved(torch.zeros(3, 4))
