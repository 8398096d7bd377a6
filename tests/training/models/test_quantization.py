"""Layers in 4 bits beside an adapter: what is trained, what is found again, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from onecurve.training import merge
from onecurve.training.config import load_recipe
from onecurve.training.errors import BadInput
from onecurve.training.models import quantization
from onecurve.training.models.base_digest import hash_base
from onecurve.training.models.loading import count_parameters, load_trained_model
from onecurve.training.outcome import Outcome
from onecurve.training.parallel.accelerator import _check_quantization
from onecurve.training.recipe import RecipeError
from onecurve.training.tasks import build_task
from tests.conftest import Launch, Run
from tests.messages import names, naming
from tests.training.models.test_adapters import LORA, compute_logits

Train = Callable[[dict[str, Any]], Run]

NF4 = {**LORA, "quantization": "nf4"}


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


def load(run: Run, is_dequantized: bool = False) -> torch.nn.Module:
    recipe = load_recipe(str(run.path / "config.yaml")).recipe
    return load_trained_model(run.path / "final", recipe, build_task(recipe), is_dequantized).eval()  # type: ignore[no-any-return]


def test_an_adapter_is_trained_beside_weights_in_four_bits(
    recipe: dict[str, Any], train: Train, bitsandbytes: Any
) -> None:
    run = train({**recipe, **NF4})
    assert run.exit_code == 0, run.stderr
    assert run.losses[-1] < run.losses[0]
    exact = train({**recipe, **LORA, "output_dir": f"{recipe['output_dir']}_exact"})
    assert run.losses[0] != exact.losses[0]
    assert run.losses[0] == pytest.approx(exact.losses[0], rel=0.05)
    assert set(load_file(run.path / "final" / "adapter_model.safetensors")) == set(
        load_file(exact.path / "final" / "adapter_model.safetensors")
    )
    model = load(run)
    assert count_parameters(model)[1] == count_parameters(load(run, is_dequantized=True))[1]
    layers = [each for each in model.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 6 + 1, "two layers of a BERT and its pooler; embeddings and head stay"
    whole = compute_logits(load(run, is_dequantized=True))
    torch.testing.assert_close(compute_logits(model), whole, rtol=1e-4, atol=1e-5)


def test_weights_of_the_same_four_bits_have_another_digest(bitsandbytes: Any) -> None:
    """The digest that a resume compares is of what the layer computes with: its scales are not in its bits."""
    one, other = quantized_linear(weight := torch.randn(8, 64)), quantized_linear(2 * weight)
    assert torch.equal(one.weight.data, other.weight.data)
    assert hash_base(one) != hash_base(other)


def test_a_resume_gives_the_same_bits(recipe: dict[str, Any], train: Train, bitsandbytes: Any, tmp_path: Path) -> None:
    whole = train({**recipe, **NF4, "checkpointing_steps": 4})
    status = whole.path / "status.json"
    expected = load_file(whole.path / "final" / "adapter_model.safetensors")
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "preempted"}))
    (whole.path / "checkpoints" / "step_00000008").rename(tmp_path / "later")
    (whole.path / "final").rename(tmp_path / "final")
    again = train({**recipe, **NF4, "checkpointing_steps": 4})
    assert again.exit_code == 0, again.stderr
    assert names(again.stdout, "step 4"), again.stdout
    found = load_file(again.path / "final" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(recipe: dict[str, Any], launch: Launch, bitsandbytes: Any) -> None:
    """DDP, each process with all of the rounded weights."""
    runs = [
        launch(
            {**recipe, **NF4, "output_dir": f"{recipe['output_dir']}_{count}"}, topology=topology, num_processes=count
        )
        for count, topology in ((1, "cpu"), (2, "multi_cpu"))
    ]
    assert [run.exit_code for run in runs] == [0, 0], runs[1].stderr
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-5)
    one, two = (load_file(run.path / "final" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    distance = sum((one[name] - two[name]).square().sum() for name in one)
    assert distance <= 1e-10 * sum(tensor.square().sum() for tensor in one.values())


def quantized_linear(weight: torch.Tensor) -> Any:
    from bitsandbytes import nn

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return quantization._quantize(nn, linear, torch.float32)


def test_a_merge_asks_first_and_has_the_rounded_weights(
    recipe: dict[str, Any], train: Train, bitsandbytes: Any, tmp_path: Path
) -> None:
    run = train({**recipe, **NF4})
    arguments = ["--run", str(run.path), "--output", str(tmp_path / "merged")]
    with pytest.raises(BadInput, match=naming("quantization", "nf4", "--yes")):
        merge.main(arguments, Outcome())
    assert not (tmp_path / "merged").exists()
    merge.main([*arguments, "--yes", "true"], Outcome())
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    logits = compute_logits(load(run))
    assert (compute_logits(merged) - logits).norm() <= 1e-4 * logits.norm()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_strategies_that_divide_weights_refuse_it(kind: DistributedType) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=kind, device=torch.device("cuda"))
    with pytest.raises(BadInput, match=naming("quantization", "nf4", "FSDP2", "DeepSpeed")):
        _check_quantization(accelerator)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = load_recipe(None, {"model_name_or_path": "m", "train_file": "t.csv", "output_dir": "o", **to_text(NF4)})
    with pytest.raises(BadInput, match=naming("quantization", "nf4", "onecurve[quantization]")):
        quantization.quantize(torch.nn.Linear(2, 2), recipe.recipe)


@pytest.mark.parametrize(
    "more",
    [{"adapter": "none"}, {"torch_compile": "true"}, {"merge_adapter": "true"}],
    ids=str,
)
def test_keys_that_contradict_it_are_refused(more: dict[str, str]) -> None:
    flags = {
        "model_name_or_path": "m",
        "train_file": "t.csv",
        "output_dir": "o",
        "adapter": "lora",
        "quantization": "nf4",
    }
    with pytest.raises(RecipeError, match=naming("quantization", *more)):
        load_recipe(None, {**flags, **more})


def to_text(settings: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in settings.items()}
