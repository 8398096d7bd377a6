"""LoRA by PEFT: what is trained, what a checkpoint and final/ hold, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from onecurve.training.config import load_recipe
from onecurve.training.errors import BadInput
from onecurve.training.models.loading import load_trained_model
from onecurve.training.tasks import build_task
from tests.conftest import Launch, Run
from tests.messages import names, naming

Train = Callable[[dict[str, Any]], Run]

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "dropout": 0.0}


def load_with_peft(run: Run, base: str) -> torch.nn.Module:
    """The trained model as anybody loads it, without a line of ours."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(run.path / "final" / "model_config.json")
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers has renamed.
        return PeftModel.from_pretrained(model, run.path / "final").eval()


def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits  # type: ignore[no-any-return]


def load_merged(run: Run) -> torch.nn.Module:
    """The whole model, as transformers loads it."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(run.path / "merged").eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "more", [{}, {"use_dora": True}, {"lora_target_modules": ["query", "value"], "use_rslora": True}]
)
def test_peft_loads_what_was_trained(recipe: dict[str, Any], train: Train, more: dict[str, Any]) -> None:
    run = train({**recipe, **LORA, **more, "checkpointing_steps": 8})
    assert run.exit_code == 0, run.stderr
    assert run.losses[-1] < run.losses[0]
    assert names(run.stdout, f"onecurve merge {run.path}"), "transformers alone would load it with another head"
    [checkpoint] = (run.path / "checkpoints").iterdir()
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        saved = {name for name in file.keys() if "position_ids" not in name}  # noqa: SIM118
    assert saved
    assert all("lora_" in name or "modules_to_save" in name for name in saved)
    adapter = load_file(run.path / "final" / "adapter_model.safetensors")
    assert len(adapter) == len(saved)
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())
    theirs = compute_logits(load_with_peft(run, recipe["model_name_or_path"]))
    resolved = load_recipe(str(run.path / "config.yaml")).recipe
    ours = compute_logits(load_trained_model(run.path / "final", resolved, build_task(resolved)).eval())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_a_checkpoint_has_twelve_bytes_for_each_trained_parameter(recipe: dict[str, Any], train: Train) -> None:
    run = train({**recipe, **LORA, "lora_r": 64, "checkpointing_steps": 8})
    adapter = load_file(run.path / "final" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in adapter.values())
    [checkpoint] = (run.path / "checkpoints").iterdir()
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) <= 1.05 * 12 * trained


def test_a_resume_gives_the_same_bits(recipe: dict[str, Any], train: Train, tmp_path: Path) -> None:
    whole = train({**recipe, **LORA, "lora_dropout": 0.1})
    settings = {**recipe, **LORA, "lora_dropout": 0.1, "output_dir": str(tmp_path / "half"), "checkpointing_steps": 4}
    train(settings)
    status = tmp_path / "half" / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "preempted"}))
    (tmp_path / "half" / "checkpoints" / "step_00000008").rename(tmp_path / "later")
    again = train(settings)
    assert names(again.stdout, "step_00000004")
    assert again.losses == whole.losses
    ours, theirs = (load_file(run.path / "final" / "adapter_model.safetensors") for run in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def train_and_change_base(recipe: dict[str, Any], train: Train, tiny_model: Path, folder: Path, **keys: Any) -> Run:
    """Train an adapter of a model whose weights are others afterwards."""
    base = folder / "base"
    base.mkdir()
    for path in tiny_model.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    run = train({**recipe, **LORA, "model_name_or_path": str(base), "checkpointing_steps": 4, **keys})
    assert run.exit_code == 0, run.stderr
    resolved = load_recipe(str(run.path / "config.yaml")).recipe
    for name in ("final", "checkpoints/step_00000008"):
        load_trained_model(run.path / name, resolved, build_task(resolved))
    weights = load_file(base / "model.safetensors")
    first = next(name for name in weights if weights[name].is_floating_point())
    weights[first] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return run


def test_a_base_that_changed_is_refused(recipe: dict[str, Any], train: Train, tiny_model: Path, tmp_path: Path) -> None:
    run = train_and_change_base(recipe, train, tiny_model, tmp_path)
    (run.path / "status.json").write_text(json.dumps({**run.read("status.json"), "state": "preempted"}))
    again = train({**recipe, **LORA, "model_name_or_path": str(tmp_path / "base"), "checkpointing_steps": 4})
    assert again.exit_code == 2
    assert names(again.stderr, "model_name_or_path", "step_00000008")


@pytest.mark.parametrize("keys", [{}, {"base_dtype": "bfloat16", "mixed_precision": "bf16"}], ids=str)
def test_a_saved_adapter_is_not_used_beside_other_weights(
    recipe: dict[str, Any], train: Train, tiny_model: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """It would give wrong numbers without a word: in a prediction, a merge, an evaluation."""
    run = train_and_change_base(recipe, train, tiny_model, tmp_path, **keys)
    resolved = load_recipe(str(run.path / "config.yaml")).recipe
    for name in ("final", "checkpoints/step_00000008"):
        with pytest.raises(BadInput, match=naming(str(run.path / name), str(tmp_path / "base"))):
            load_trained_model(run.path / name, resolved, build_task(resolved))
    settings = {**recipe, **LORA, "model_name_or_path": str(tmp_path / "base"), "checkpointing_steps": 4, **keys}
    evaluated = train({**settings, "eval_only": True})
    assert evaluated.exit_code == 2
    assert names(evaluated.stderr, str(run.path / "final"), str(tmp_path / "base"))


def test_a_base_that_is_gone_is_named(recipe: dict[str, Any], train: Train, tiny_model: Path, tmp_path: Path) -> None:
    run = train_and_change_base(recipe, train, tiny_model, tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    resolved = load_recipe(str(run.path / "config.yaml")).recipe
    with pytest.raises(BadInput, match=naming(str(run.path / "final"), str(tmp_path / "base"))):
        load_trained_model(run.path / "final", resolved, build_task(resolved))


def test_an_adapter_is_trained_on(recipe: dict[str, Any], train: Train, tmp_path: Path) -> None:
    first = train({**recipe, **LORA})
    more = {"adapter": "lora", "learning_rate": 1e-2, "dropout": 0.0, "output_dir": str(tmp_path / "second")}
    by_key = train({**recipe, **more, "adapter_name_or_path": str(first.path / "final")})
    assert by_key.exit_code == 0, by_key.stderr
    assert by_key.losses[0] < first.losses[0]
    by_name = train(
        {**recipe, **more, "model_name_or_path": str(first.path / "final"), "output_dir": str(tmp_path / "third")}
    )
    assert by_name.losses == by_key.losses


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_r": 4}, ("lora_r", "adapter: lora")),
        ({"adapter": "lora", "lora_target_modules": ["nowhere"]}, ("lora_target_modules", "nowhere", "query")),
        ({"adapter": "lora", "modules_to_save": ["nowhere"]}, ("modules_to_save", "nowhere")),
        ({"adapter": "lora", "adapter_name_or_path": "nowhere"}, ("adapter_name_or_path", "nowhere")),
        ({"adapter": "lora", "adapter_name_or_path": "x", "lora_r": 4}, ("lora_r", "adapter_name_or_path")),
        ({"adapter": "lora", "freeze": ["bert.*"]}, ("freeze",)),
        ({"adapter": "lora", "layerwise_lr_decay": 0.9}, ("layerwise_lr_decay",)),
        ({"merge_adapter": True}, ("merge_adapter", "adapter: lora")),
        ({"freeze": ["nowhere.*"]}, ("freeze", "nowhere.*")),
        ({"freeze": ["*"]}, ("freeze",)),
    ],
)
def test_what_fits_nothing_is_refused(
    recipe: dict[str, Any], train: Train, settings: dict[str, Any], told: tuple[str, ...]
) -> None:
    run = train({**recipe, **settings})
    assert run.exit_code == 2
    assert names(run.stderr, *told)
    assert not run.path.exists()


def test_an_adapter_without_the_word_is_refused(recipe: dict[str, Any], train: Train, tmp_path: Path) -> None:
    first = train({**recipe, **LORA})
    run = train({**recipe, "model_name_or_path": str(first.path / "final"), "output_dir": str(tmp_path / "second")})
    assert run.exit_code == 2
    assert names(run.stderr, "model_name_or_path", "adapter: lora")


def test_frozen_parameters_stay_as_they_are(recipe: dict[str, Any], train: Train, tiny_model: Path) -> None:
    run = train({**recipe, "freeze": ["bert.embeddings.*"]})
    before, after = load_file(tiny_model / "model.safetensors"), load_file(run.path / "final" / "model.safetensors")
    for name, tensor in before.items():
        is_frozen = "embeddings" in name
        own = after[f"bert.{name}" if f"bert.{name}" in after else name]
        assert torch.equal(own, tensor) == is_frozen, name


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["multi_gpu", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_every_strategy_trains_the_whole_adapter(
    recipe: dict[str, Any], launch: Launch, tmp_path: Path, topology: str
) -> None:
    """docs/adapters.md has the table of it."""
    settings = {**recipe, **LORA, "checkpointing_steps": 4, "merge_adapter": True}
    alone = launch({**settings, "output_dir": str(tmp_path / "alone")})
    run = launch(settings, topology=topology, num_processes=2)
    assert run.exit_code == 0, run.stderr
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    expected, found = (load_file(each.path / "final" / "adapter_model.safetensors") for each in (alone, run))
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).square().sum() for name in expected).sqrt()
    assert difference <= 1e-5 * sum(tensor.square().sum() for tensor in expected.values()).sqrt()
    logits = compute_logits(load_with_peft(run, recipe["model_name_or_path"]))
    merged = compute_logits(load_merged(run))
    assert (merged - logits).norm() <= 1e-4 * logits.norm()
    # Another strategy goes on from its checkpoint.
    (run.path / "status.json").write_text(json.dumps({**run.read("status.json"), "state": "preempted"}))
    (run.path / "checkpoints" / "step_00000008").rename(tmp_path / "later")
    again = launch(settings)
    assert again.losses == pytest.approx(alone.losses, rel=1e-5)
    assert compute_logits(load_with_peft(again, recipe["model_name_or_path"])).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fsdp", "deepspeed_zero3"])
def test_a_divided_base_goes_on_to_the_same_curve(
    recipe: dict[str, Any], train: Train, launch: Launch, tmp_path: Path, topology: str
) -> None:
    """Each process reads its part of the base, also of embeddings that are trained whole; and an evaluation does."""
    settings = {**recipe, **LORA, "modules_to_save": ["word_embeddings"], "checkpointing_steps": 4}
    alone = train({**settings, "output_dir": str(tmp_path / "alone")})
    divide = partial(launch, topology=topology, num_processes=2)
    run = divide(settings)
    assert run.losses == pytest.approx(alone.losses, rel=1e-5), run.stderr
    expected, found = (load_file(each.path / "final" / "adapter_model.safetensors") for each in (alone, run))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    predictions = run.path / "eval_predictions.jsonl"
    before = predictions.read_text()
    predictions.unlink()
    evaluated = divide({**settings, "eval_only": True})
    assert evaluated.exit_code == 0, evaluated.stderr
    assert predictions.read_text() == before
    (run.path / "status.json").write_text(json.dumps({**run.read("status.json"), "state": "preempted"}))
    (run.path / "checkpoints" / "step_00000008").rename(tmp_path / "later")
    again = divide(settings)
    assert names(again.stdout, "step_00000004")
    assert again.losses == pytest.approx(run.losses, rel=1e-6)


def test_any_checkpoint_of_an_adapter_predicts(recipe: dict[str, Any], train: Train) -> None:
    run = train({**recipe, **LORA, "checkpointing_steps": 8})
    resolved = load_recipe(str(run.path / "config.yaml")).recipe
    of_checkpoint, of_final = (
        compute_logits(load_trained_model(run.path / name, resolved, build_task(resolved)).eval())
        for name in ("checkpoints/step_00000008", "final")
    )
    torch.testing.assert_close(of_checkpoint, of_final, rtol=0, atol=0)
