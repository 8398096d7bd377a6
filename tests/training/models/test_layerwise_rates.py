"""layerwise_lr_decay in a training: each layer moves by its own rate, under every strategy and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Launch, Run
from tests.training.conftest import stop_and_resume

Train = Callable[[dict[str, Any]], Run]

DECAY = {"layerwise_lr_decay": 0.5, "dropout": 0.0}


def measure_moves(run: Run, tiny_model: Path) -> dict[str, float]:
    """The largest change of each pretrained parameter."""
    before, after = load_file(tiny_model / "model.safetensors"), load_file(run.path / "final" / "model.safetensors")
    return {
        name: float((after[f"bert.{name}"] - tensor).abs().max())
        for name, tensor in before.items()
        if f"bert.{name}" in after
    }


def check_moves(moves: dict[str, float], learning_rate: float) -> None:
    """AdamW's first update is the learning rate itself, in the direction of the gradient (Kingma and Ba 2015)."""
    for part, depth in (("encoder.layer.1.", 1), ("encoder.layer.0.", 2), ("embeddings.word", 3)):
        of_part = [move for name, move in moves.items() if name.startswith(part)]
        assert of_part
        assert max(of_part) == pytest.approx(learning_rate * 0.5**depth, rel=1e-2), part


def test_a_layer_moves_by_its_own_rate(recipe: dict[str, Any], train: Train, tiny_model: Path) -> None:
    run = train({**recipe, **DECAY, "max_train_steps": 1})
    assert run.exit_code == 0, run.stderr
    check_moves(measure_moves(run, tiny_model), recipe["learning_rate"])
    assert run.steps[0]["learning_rate"] == recipe["learning_rate"], "the head's is reported"


def test_a_resume_gives_the_same_bits(recipe: dict[str, Any], train: Train, tmp_path: Path) -> None:
    settings = {**recipe, **DECAY}
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    resumed = stop_and_resume(train, settings, tmp_path)
    assert resumed.losses == whole.losses
    expected, found = (load_file(run.path / "final" / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["multi_cpu", "fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_every_strategy_has_the_rates(
    recipe: dict[str, Any], launch: Launch, train: Train, tiny_model: Path, tmp_path: Path, topology: str
) -> None:
    settings = {**recipe, **DECAY}
    first = launch({**settings, "max_train_steps": 1, "output_dir": str(tmp_path / "first")}, topology, 2)
    assert first.exit_code == 0, first.stderr
    check_moves(measure_moves(first, tiny_model), recipe["learning_rate"])
    alone = train({**settings, "output_dir": str(tmp_path / "alone")})
    run = launch({**settings, "checkpointing_steps": 4}, topology, 2)
    assert run.exit_code == 0, run.stderr
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    expected, found = (load_file(each.path / "final" / "model.safetensors") for each in (alone, run))
    difference = sum((found[name] - expected[name]).square().sum() for name in expected).sqrt()
    assert difference <= 1e-5 * sum(tensor.square().sum() for tensor in expected.values()).sqrt()
