"""fp16's loss scale goes on in a resumed training, and one that never updates a weight is no training."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from onecurve.training.errors import Diverged
from onecurve.training.models import optimization
from onecurve.training.parallel.loss_scale import check_updates, read_loss_scale, restore_loss_scale


class Training:
    """A weight under a scaler of torch's on the CPU, which accelerate has on GPUs only."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**16, growth_interval=3)
        self.accelerator: Any = SimpleNamespace(
            mixed_precision="fp16", distributed_type=DistributedType.MULTI_GPU, scaler=scaler
        )

    def step(self, factor: float) -> None:
        scaler = self.accelerator.scaler
        scaler.scale(self.weight.sum() * factor).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()


def test_a_resumed_training_goes_on_with_the_scale() -> None:
    whole = Training()
    for factor in (math.inf, math.inf, 1.0, 1.0):
        whole.step(factor)
    state = json.loads(json.dumps(read_loss_scale(whole.accelerator, whole.optimizer)))
    assert (state["scale"], state["_growth_tracker"]) == (2.0**14, 2)
    resumed = Training()
    restore_loss_scale(resumed.accelerator, resumed.optimizer, state)
    for training in (whole, resumed):  # The third good step: the scale grows.
        training.step(1.0)
        assert training.accelerator.scaler.get_scale() == 2.0**15


def test_other_precisions_have_none() -> None:
    accelerator: Any = SimpleNamespace(mixed_precision="bf16")
    assert read_loss_scale(accelerator, None) == {}
    restore_loss_scale(accelerator, None, {})
    check_updates(accelerator, None)


def build_engine() -> tuple[Any, Any]:
    scaler = SimpleNamespace(
        cur_scale=2.0**16, cur_iter=0, last_overflow_iter=-1, cur_hysteresis=2, raise_error_at_min_scale=True
    )
    accelerator: Any = SimpleNamespace(mixed_precision="fp16", distributed_type=DistributedType.DEEPSPEED)
    return accelerator, SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))


def test_deepspeeds_scaler_goes_on_and_does_not_raise_its_own_error() -> None:
    accelerator, optimizer = build_engine()
    scaler = optimizer.optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 2.0**10, 9, 5, 1
    state = json.loads(json.dumps(read_loss_scale(accelerator, optimizer)))
    accelerator, optimizer = build_engine()
    restore_loss_scale(accelerator, optimizer, state)
    assert read_loss_scale(accelerator, optimizer) == state
    assert optimizer.optimizer.loss_scaler.raise_error_at_min_scale is False


def test_another_strategy_goes_on_with_the_scale() -> None:
    accelerator, optimizer = build_engine()
    restore_loss_scale(accelerator, optimizer, {"scale": 2.0**12, "_growth_tracker": 2})
    state = read_loss_scale(accelerator, optimizer)
    assert (state["cur_scale"], state["cur_iter"]) == (2.0**12, 0)
    training = Training()
    restore_loss_scale(training.accelerator, training.optimizer, state)
    assert training.accelerator.scaler.state_dict()["scale"] == 2.0**12


@pytest.mark.parametrize(("factors", "is_training"), [((math.inf,), False), ((math.inf, 1.0), True)])
def test_a_training_that_skipped_every_step_has_diverged(factors: tuple[float, ...], is_training: bool) -> None:
    training = Training()
    for factor in factors:
        training.step(factor)
    if is_training:
        check_updates(training.accelerator, training.optimizer)
        return
    with pytest.raises(Diverged):
        check_updates(training.accelerator, training.optimizer)


@pytest.mark.parametrize("has_overflown", [False, True])
def test_deepspeeds_norm_of_a_skipped_step_is_not_that_of_an_earlier_one(has_overflown: bool) -> None:
    engine = SimpleNamespace(optimizer=SimpleNamespace(overflow=has_overflown))
    accelerator: Any = SimpleNamespace(
        mixed_precision="fp16",
        distributed_type=DistributedType.DEEPSPEED,
        device=torch.device("cpu"),
        deepspeed_engine_wrapped=SimpleNamespace(engine=engine),
        clip_grad_norm_=lambda parameters, max_norm: 0.5,
    )
    norm = optimization.clip_gradients(accelerator, torch.nn.Linear(1, 1), 1.0)
    assert float(norm) == (math.inf if has_overflown else 0.5)
