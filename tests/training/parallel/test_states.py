"""A checkpoint holds each weight once, also one that has several names, and those of earlier versions are still read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from onecurve.training.errors import BadInput
from onecurve.training.models.shares import Cut, Shares
from onecurve.training.parallel.states import count_state_bytes, list_weights, load_moments, load_weights
from tests.conftest import Launch
from tests.messages import naming
from tests.tensors import load_tensors

_SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
# By what is tied: the model, and the names that a tied weight has beside its first.
TIED: dict[str, tuple[Any, Any, set[str]]] = {
    "head": (
        AutoModelForCausalLM,
        LlamaConfig(**_SMALL, num_key_value_heads=1, tie_word_embeddings=True),
        {"lm_head.weight"},
    ),
    "gpt2": (AutoModelForCausalLM, GPT2Config(vocab_size=50, n_embd=12, n_layer=2, n_head=2), {"lm_head.weight"}),
    "head and its bias": (
        AutoModelForMaskedLM,
        BertConfig(**_SMALL),
        {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"},
    ),
    "encoder and decoder": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=50, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2, tie_word_embeddings=True),
        {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
    ),
}


def build(kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    loader, config, _ = TIED[kind]
    return loader.from_config(config)


def write_checkpoint(folder: Path, kind: str, is_old: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, and its config; an old one has a tied weight under each of its names."""
    folder.mkdir()
    model = build(kind, 1)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    saved = model.state_dict() if is_old else dict(list_weights(Accelerator(cpu=True), model))
    plain = {name: value.clone() for name, value in saved.items() if isinstance(value, torch.Tensor)}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_weight_is_kept_once(kind: str, tmp_path: Path) -> None:
    expected, model = write_checkpoint(tmp_path / "new", kind), build(kind, 2)
    kept = load_file(tmp_path / "new" / "model.safetensors")
    assert expected.keys() - kept.keys() == TIED[kind][2]
    assert 4 * sum(each.numel() for each in model.parameters()) == sum(each.nbytes for each in kept.values())
    assert count_state_bytes(model) == 3 * sum(each.nbytes for each in kept.values())
    read = TIED[kind][0].from_pretrained(tmp_path / "new").state_dict()
    assert all(torch.equal(read[name], value) for name, value in expected.items())


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("kind", TIED)
def test_checkpoints_of_both_kinds_are_read(kind: str, is_old: bool, tmp_path: Path) -> None:
    expected, model = write_checkpoint(tmp_path / "checkpoint", kind, is_old), build(kind, 2)
    load_weights(tmp_path / "checkpoint", model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    for is_flat in (False, True):  # Of FSDP2 and of ZeRO-3: each process reads its part.
        build(kind, 2).save_pretrained(tmp_path / "base")
        parts = [Shares(Cut(rank, 2, is_flat)) for rank in range(2)]
        for shares in parts:
            divided = shares.load(lambda: TIED[kind][0].from_pretrained(tmp_path / "base"))
            load_weights(tmp_path / "checkpoint", divided, shares)
        for name, _ in divided.named_parameters():
            whole = torch.cat([shares.parts[name] for shares in parts]).view_as(expected[name])
            assert torch.equal(whole, expected[name]), name


def test_a_weight_that_only_one_side_has_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "head", is_old=True)
    path = tmp_path / "checkpoint" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "more.weight": torch.ones(2)}, path)
    with pytest.raises(BadInput, match=naming("more.weight")):
        load_weights(path.parent, build("head", 2))
    save_file({name: value for name, value in weights.items() if name != "model.norm.weight"}, path)
    with pytest.raises(BadInput, match=naming("model.norm.weight")):
        load_weights(path.parent, build("head", 2))


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fsdp", "deepspeed_zero3"])
def test_a_divided_run_keeps_a_tied_weight_once(topology: str, causal: dict[str, Any], launch: Launch) -> None:
    keys = {**causal, "max_train_steps": 2, "checkpointing_steps": 1}
    run = launch(keys, topology=topology, num_processes=2)
    assert run.exit_code == 0, run.stderr
    checkpoint = run.path / "checkpoints" / "step_00000002"
    model = AutoModelForCausalLM.from_pretrained(run.path / "final")
    weights = load_tensors(checkpoint / "model.safetensors")
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in weights.items())
    moments = load_tensors(checkpoint / "optimizer.safetensors")
    sizes = sum(each.nbytes for each in (*weights.values(), *moments.values()))
    assert sizes == 12 * sum(each.numel() for each in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["deepspeed_zero2", "deepspeed_zero3"])
def test_frozen_weights_are_saved_as_they_were_read(
    topology: str, recipe: dict[str, Any], tiny_model: Path, launch: Launch
) -> None:
    """DeepSpeed has them in half precision only."""
    keys = {**recipe, "freeze": ["bert.embeddings.*"], "mixed_precision": "bf16", "max_train_steps": 2}
    run = launch({**keys, "checkpointing_steps": 1}, topology=topology, num_processes=2)
    assert run.exit_code == 0, run.stderr
    read = load_file(tiny_model / "model.safetensors")
    for folder in (run.path / "checkpoints" / "step_00000002", run.path / "final"):
        saved = load_tensors(folder / "model.safetensors")
        frozen = {name: value for name, value in read.items() if "embeddings" in name}
        assert frozen
        for name, value in frozen.items():
            found = saved[name if name in saved else f"bert.{name}"]
            assert found.dtype == torch.float32
            assert torch.equal(found, value), name


def test_adamws_counter_is_on_the_device_of_the_weights(tmp_path: Path) -> None:
    """The fused AdamW of a GPU refuses any other."""
    model = torch.nn.Linear(3, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    moments = {f"weight.{key}": torch.ones(2, 3) for key in ("exp_avg", "exp_avg_sq")}
    save_file(moments, tmp_path / "optimizer.safetensors")
    load_moments(Accelerator(cpu=True), model, optimizer, tmp_path, step=7)
    assert {name: value.device.type for name, value in optimizer.state[model.weight].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }
