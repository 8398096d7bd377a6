"""The loop: no step waits for the device."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onecurve.training import run
from onecurve.training.models import matrix_attention
from onecurve.training.models.example_masks import ExampleMasks
from onecurve.training.parallel.micro_batch import begin_micro_batch
from tests.conftest import Run
from tests.host_waits import HostWaits


@pytest.mark.parametrize(
    "settings",
    [
        {"class_weights": "balanced", "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "label_smoothing_factor": 0.1},
        {"max_grad_norm": 0, "lr_scheduler_type": "cosine"},
    ],
)
def test_no_step_waits_for_the_device(
    recipe: dict[str, Any],
    train: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    """Forward, backward, clipping, update and log, from the second step on. The model runs as it would on a GPU."""
    monkeypatch.setattr(matrix_attention, "install", lambda model: None)
    # There masks are drawn on the device (philox_torch.py), and a few counters alone come from the host.
    monkeypatch.setattr(ExampleMasks, "draw", lambda masks, site, shape, *rest: torch.ones(shape, dtype=torch.bool))
    monkeypatch.setattr(matrix_attention, "_is_on_host", lambda tensor: False)
    waits, watch = HostWaits(), contextlib.ExitStack()
    reads: list[str] = []
    numbers = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu")}

    def note(name: str) -> Any:
        def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            caller = traceback.extract_stack()[-2]
            if "late_values" not in caller.filename:
                reads.append(f"{name} in {caller.filename}:{caller.lineno}")
            return numbers[name](tensor, *arguments, **options)

        return call

    steps: list[int] = []

    def begin_and_watch(accelerator: Any, micro_batch: Any, recipe: Any) -> float:
        if micro_batch.step == 1 and micro_batch.position == 0:
            watch.enter_context(waits)
            for name in numbers:
                monkeypatch.setattr(torch.Tensor, name, note(name))
        return begin_micro_batch(accelerator, micro_batch, recipe)

    def conclude(session: Any) -> None:
        steps.append(session.progress.step)
        if session.progress.step == 6:
            watch.close()
            for name, native in numbers.items():
                monkeypatch.setattr(torch.Tensor, name, native)
        return

    monkeypatch.setattr(run, "begin_micro_batch", begin_and_watch)
    monkeypatch.setattr(run, "conclude_step", conclude)
    result = train({**recipe, **settings, "max_train_steps": 6, "attn_implementation": "sdpa", "dropout": 0.1})
    assert result.exit_code == 0, result.stderr
    assert steps == list(range(1, 7))
    assert waits.places == []
    assert reads == []
    assert waits.places_in_models == []
