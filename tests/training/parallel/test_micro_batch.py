"""The beginning of a micro-batch: its random numbers."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType

from onecurve.training.data.plan import MicroBatch
from onecurve.training.models import example_masks
from onecurve.training.parallel.micro_batch import _seed, begin_micro_batch


def draw(step: int = 0, process: int = 0, seed: int = 1, position: int = 0, masks: str = "torch") -> list[float]:
    """Random numbers that a model draws from torch's generator in a micro-batch."""
    accelerator: Any = SimpleNamespace(
        process_index=process,
        num_processes=2,
        distributed_type=DistributedType.MULTI_CPU,
        step=0,
        device=torch.device("cpu"),
    )
    plan = MicroBatch(np.arange(2), step=step, position=position, num_micro_batches=3)
    recipe: Any = SimpleNamespace(seed=seed, dropout_masks=masks)
    begin_micro_batch(accelerator, plan, recipe)
    example_masks.begin(None)
    return torch.rand(4).tolist()


def test_numbers_of_python_and_numpy_are_of_the_step_as_well() -> None:
    found = []
    for step in (0, 1, 0):
        draw(step=step)
        found.append((random.random(), np.random.rand()))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_with_torchs_masks_random_numbers_are_of_seed_step_and_process() -> None:
    first = draw()
    draw(step=7)
    assert draw() == first, "a step that is made again draws what it drew"
    assert len({tuple(numbers) for numbers in (first, draw(step=1), draw(process=1), draw(seed=2))}) == 4


def test_with_torchs_masks_later_micro_batches_go_on_with_a_steps_random_numbers() -> None:
    assert draw() != draw(position=1)


def test_with_masks_by_example_every_micro_batch_of_a_step_draws_the_same() -> None:
    """A layer that one micro-batch skips is skipped by all, on any process."""
    first = draw(masks="by_example")
    assert draw(process=1, position=2, masks="by_example") == first
    assert draw(step=1, masks="by_example") != first
    assert draw(seed=2, masks="by_example") != first


def test_the_device_is_seeded_as_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = Mock()
    monkeypatch.setattr(torch, "get_device_module", lambda device: seeds[device.type])
    seeds.__getitem__ = Mock(return_value=seeds)
    torch.default_generator.manual_seed(0)
    _seed(2**40 + 6, torch.device("cuda"))
    seeds.__getitem__.assert_called_once_with("cuda")
    seeds.manual_seed.assert_called_once_with(2**39 + 3)
    assert torch.default_generator.initial_seed() == 2**39 + 3
