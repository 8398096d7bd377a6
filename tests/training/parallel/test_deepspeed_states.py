"""AdamW's state inside a DeepSpeed engine. Whole resumes: tests/test_stops.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecurve.training.parallel.deepspeed_states import create_states
from onecurve.training.parallel.states import MOMENTS


@pytest.mark.parametrize(
    "name", ["fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"]
)
def test_the_counter_of_adamw_is_on_the_device_of_the_weights(name: str) -> None:
    """The fused AdamW refuses a counter on the CPU when the weights are on a GPU; "meta" stands for the GPU."""
    flat = torch.zeros(4, device="meta")
    inner = torch.optim.AdamW([flat])
    engine_optimizer: Any = SimpleNamespace(**{name: [flat]})
    create_states(engine_optimizer, inner, 7.0, MOMENTS)
    state = inner.state[flat]
    assert {value.device.type for value in state.values()} == {"meta"}
    assert set(state) == {"step", *MOMENTS}
    assert state["step"].dtype == torch.float32


def test_the_counter_has_the_value() -> None:
    flat = torch.zeros(4)
    inner = torch.optim.AdamW([flat])
    engine_optimizer: Any = SimpleNamespace(single_partition_of_fp32_groups=[flat])
    create_states(engine_optimizer, inner, 7.0, MOMENTS)
    assert float(inner.state[flat]["step"]) == 7.0
