"""What the Accelerator of a training is set to."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from onecurve.training.config import Recipe
from onecurve.training.parallel import accelerator as module
from onecurve.training.parallel.accelerator import build_accelerator, forget_state


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    forget_state()


def build(**settings: Any) -> Accelerator:
    recipe = Recipe(model_name_or_path="m", train_file=("t",), **settings)
    return build_accelerator(recipe, torch.nn.Linear(1, 1), timedelta(seconds=10))


def test_gradients_of_ddp_are_views_into_its_buckets() -> None:
    handler = build().ddp_handler
    assert handler is not None
    assert handler.gradient_as_bucket_view
    assert not handler.broadcast_buffers


@pytest.mark.parametrize("allowed", [False, True])
def test_torch_compile_does_not_change_the_precision_of_float32(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    def build_as_on_a_gpu(**options: Any) -> Accelerator:
        torch.backends.cuda.matmul.allow_tf32 = True  # As accelerate does on a GPU.
        return Accelerator(**options)

    monkeypatch.setattr(module, "Accelerator", build_as_on_a_gpu)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        build(torch_compile=True)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
