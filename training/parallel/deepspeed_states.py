"""Weights and AdamW's moments inside a DeepSpeed engine, by parameter.

DeepSpeed keeps them in flat float32 partitions, which have another name in each ZeRO stage. They are read and written with
its accessors: of whole tensors and, under ZeRO-3, of this rank's part of a tensor.
"""

from __future__ import annotations

from typing import Any

import torch

# Attributes of the engine's optimizer: ZeRO-3, ZeRO-1 and 2, and bf16 without ZeRO's partitions.
_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def read_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole weight, in float32. Every rank must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    weight: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    return parameter if weight is None else weight


def read_moment(parameter: torch.nn.Parameter, key: str) -> torch.Tensor | None:
    """One of AdamW's moments, whole; None before the first update. Every rank must call it.

    Args:
        key: one of `states.MOMENTS`.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    moment: torch.Tensor | None = safe_get_full_optimizer_state(parameter, key)
    return moment


def write_weight(parameter: Any, whole: torch.Tensor) -> None:
    """Set a float32 weight from the whole tensor."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if _is_partitioned(parameter):
        safe_set_local_fp32_param(parameter, _cut_own_part(parameter, whole))
    else:
        safe_set_full_fp32_param(parameter, whole)


def replace_weight(parameter: Any, whole: torch.Tensor) -> None:
    """Set a weight from the whole tensor: the float32 one, and the one of any precision that the forward uses."""
    write_weight(parameter, whole)
    if _is_partitioned(parameter):
        parameter.ds_tensor.data.copy_(_cut_own_part(parameter, whole).view_as(parameter.ds_tensor))
    if parameter.data.shape == whole.shape:  # Under ZeRO-3 only small parameters stay gathered.
        parameter.data.copy_(whole)


def write_moment(parameter: Any, key: str, whole: torch.Tensor) -> None:
    """Set one of AdamW's moments from the whole tensor, after `create_states`."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    # ZeRO-3's setter of whole tensors fails if parts are padded.
    if _is_partitioned(parameter):
        safe_set_local_optimizer_state(parameter, _cut_own_part(parameter, whole), key)
    else:
        safe_set_full_optimizer_state(parameter, whole, key)


def create_states(engine_optimizer: Any, inner: torch.optim.Optimizer, step: float, keys: tuple[str, ...]) -> None:
    """Create the state that AdamW otherwise creates at its first step; the engine's setters need it.

    Args:
        engine_optimizer: DeepSpeed's wrapper of `inner`.
        step: updates that AdamW has made.
        keys: names of the moments.
    """
    for name in _PARTITIONS:
        for flat in getattr(engine_optimizer, name, ()):
            moments = {key: torch.zeros_like(flat) for key in keys}
            inner.state[flat] = {"step": _make_step(inner, flat, step), **moments}
    link_states(engine_optimizer)


def _make_step(inner: torch.optim.Optimizer, flat: torch.Tensor, step: float) -> Any:
    if not isinstance(inner, torch.optim.AdamW):  # DeepSpeed's CPUAdam counts with a plain number.
        return int(step)
    # The fused AdamW needs its counter on the device of the weights.
    return torch.tensor(step, dtype=torch.float32, device=flat.device)


def link_states(engine_optimizer: Any) -> None:
    """Let DeepSpeed's accessors find the moments of every parameter group.

    ZeRO-1 and 2 link them only once, after the first group has stepped and before the others have a state (0.19.8).
    """
    if hasattr(engine_optimizer, "_hp_optimizer_states_linked"):
        engine_optimizer._hp_optimizer_states_linked = False
        engine_optimizer._lazy_init_hp_params_optimizer_state()


def _is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 has divided this parameter among the ranks."""
    return hasattr(parameter, "ds_tensor")


def _cut_own_part(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter under ZeRO-3, with the padding of the last rank."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padded = torch.nn.functional.pad(whole.flatten(), (0, size * torch.distributed.get_world_size()))
    return padded.narrow(0, size * rank, size)
