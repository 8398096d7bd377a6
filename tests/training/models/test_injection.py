"""An adapter in a model of which each process holds its share: together they are what one process would have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig
from safetensors.torch import save_file

from onecurve.training.building import _prepare
from onecurve.training.errors import Fault
from onecurve.training.models.adapters import Adapter, choose_trained, needs_base, open_adapter, save_adapter
from onecurve.training.models.base_digest import hash_base
from onecurve.training.models.injection import reads_base
from onecurve.training.models.shares import Cut, Shares, is_reserved
from onecurve.training.parallel.states import list_weights, load_weights
from onecurve.training.tasks import build_task, find_task
from tests.messages import naming
from tests.training.models.conftest import make_recipe
from tests.training.models.test_shares import join, save

# PEFT's own remarks on tied layers, on GPT-2's kind of layers and on mixtures.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

# Of a model: the task, what is trained whole beside the matrices, and what is held whole by each process.
CASES: dict[str, tuple[str, tuple[str, ...], set[str]]] = {
    "a new head": ("text_classification", ("word_embeddings",), {"classifier", "pooler"}),
    "tied": ("causal_lm", ("wte", "lm_head"), set()),
    "an own head": ("causal_lm", ("embed_tokens", "lm_head"), set()),
    "merged experts": ("causal_lm", (), {"experts"}),
}


def put_in(name: str, model: Any, adapter: Adapter | None = None, shares: Shares | None = None) -> Any:
    task, modules, _ = CASES[name]
    settings: dict[str, Any] = {"model_name_or_path": "none", "train_file": ("none",), "task": task}
    settings |= {"adapter": "lora", "lora_r": 2, "modules_to_save": modules}
    recipe = find_task(task).recipe_class(**settings)
    set_seed(7)
    choose_trained(model, recipe, build_task(recipe), adapter, shares)
    return model


def build_parts(name: str, load: Callable[[], Any], is_flat: bool, adapter: Adapter | None = None) -> list[Any]:
    """Of two processes, the model and the shares."""
    shares = [Shares(Cut(rank, 2, is_flat), keeps_maps=True) for rank in range(2)]
    return [(put_in(name, each.load(load), adapter, each), each) for each in shares]


def compare(parts: list[tuple[Any, Shares]], whole: Any) -> None:
    for model, shares in parts:
        shares.check(model)
        found = dict(model.named_parameters())
        assert list(found) == [key for key, _ in whole.named_parameters()]
        for key, expected in whole.named_parameters():
            assert found[key].requires_grad == expected.requires_grad
            assert is_reserved(found[key]) == (key in shares.parts)
            value = found[key]
            if key in shares.parts:
                value = join([each.parts[key] for _, each in parts], expected)
            assert torch.equal(value, expected), key
        assert hash_base(model, shares) == hash_base(whole)


@pytest.mark.parametrize("is_flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole_model(name: str, is_flat: bool, tmp_path: Path) -> None:
    load = save(tmp_path, name, torch.bfloat16)
    whole = put_in(name, load())
    parts = build_parts(name, load, is_flat)
    compare(parts, whole)
    own = {key for key, _ in whole.named_parameters() if "lora_" not in key} - parts[0][1].parts.keys()
    assert {next((each for each in CASES[name][2] if each in key), key) for key in own} == CASES[name][2]


@pytest.mark.parametrize("is_flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("name", CASES)
def test_what_was_trained_is_read_by_parts(name: str, is_flat: bool, tmp_path: Path) -> None:
    """From final/ and from a checkpoint."""
    load = save(tmp_path / "base", name, torch.float32)
    trained = put_in(name, load())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += parameter.requires_grad * torch.randn_like(parameter)
    weights = dict(list_weights(Accelerator(cpu=True), trained))
    saved = {key: value.clone() for key, value in weights.items() if isinstance(value, torch.Tensor)}
    (tmp_path / "adapter").mkdir()
    trained.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_adapter(trained, saved, tmp_path / "adapter")
    save_file(saved, tmp_path / "model.safetensors")
    compare(build_parts(name, load, is_flat, open_adapter(tmp_path / "adapter")), trained)
    parts = build_parts(name, load, is_flat)
    for model, shares in parts:
        load_weights(tmp_path, model, shares)
    compare(parts, trained)


def test_a_weight_that_would_stay_zero_is_named(tmp_path: Path) -> None:
    [(model, shares), _] = build_parts("an own head", save(tmp_path, "an own head", torch.float32), is_flat=False)
    key = next(name for name in shares.parts if "base_layer" in name)
    part = shares.parts.pop(key)
    with pytest.raises(Fault, match=naming(key)):
        _prepare(Accelerator(cpu=True), model, make_recipe(), shares)
    shares.parts |= {key: part, "another.weight": part}
    with pytest.raises(Fault, match=naming("another.weight")):
        shares.check(model)
    whole = shares.maps.pop(key)
    with pytest.raises(Fault, match=naming(key)):
        hash_base(model, shares)
    del shares.parts["another.weight"]
    model.get_parameter(key).data = whole.clone()
    with pytest.raises(Fault, match=naming(key)):
        shares.check(model)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"r": 3, "lora_alpha": 5, "modules_to_save": ["head"], "target_modules": "all-linear", "use_rslora": True},
            False,
        ),
        ({"init_lora_weights": "gaussian"}, False),
        ({"init_lora_weights": "pissa"}, True),
        ({"init_lora_weights": "olora"}, True),
        ({"use_dora": True}, True),
        ({"bias": "all"}, True),
        ({"trainable_token_indices": [1, 2]}, True),
        ({"layer_replication": [(0, 1)]}, True),
    ],
    ids=str,
)
def test_an_adapter_that_is_made_of_the_weights_is_known(settings: dict[str, Any], expected: bool) -> None:
    assert reads_base(LoraConfig(**settings)) == expected


def test_dora_and_other_types_of_weights_need_the_whole_model(tmp_path: Path) -> None:
    lora: dict[str, Any] = {"adapter": "lora"}
    assert not needs_base(make_recipe(use_dora=False))
    assert not needs_base(make_recipe(**lora))
    assert needs_base(make_recipe(**lora, use_dora=True))
    assert needs_base(make_recipe(**lora, base_dtype="bfloat16", mixed_precision="bf16"))
    assert needs_base(make_recipe(**lora, quantization="nf4"))
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    for use_dora in (False, True):
        LoraConfig(base_model_name_or_path="none", use_dora=use_dora).save_pretrained(str(tmp_path))
        assert needs_base(make_recipe(**lora, adapter_name_or_path=str(tmp_path))) == use_dora
