"""Weights and AdamW's moments inside a DeepSpeed engine, by parameter.

DeepSpeed keeps them in flat float32 partitions, which have another name in each ZeRO stage. They are read and written with
its accessors: of whole tensors and, under ZeRO-3, of this rank's part of a tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from onecurve.training.models.tensor_files import TensorFiles
from onecurve.training.parallel.gathering import Divided

# Attributes of the engine's optimizer: ZeRO-3, ZeRO-1 and 2, and bf16 without ZeRO's partitions.
_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


# Attribute of a weight that is not trained, where the engine rounds it.
_FROZEN = "_onecurve_frozen"


def read_weight(parameter: Any) -> torch.Tensor | Divided:
    """The weight, in float32. Every rank must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    exact = getattr(parameter, _FROZEN, None)
    if _is_partitioned(parameter):
        return _divide(parameter, safe_get_local_fp32_param(parameter) if exact is None else exact)
    weight: torch.Tensor | None = safe_get_full_fp32_param(parameter) if exact is None else exact
    return parameter if weight is None else weight


def keep_frozen(parameter: Any, weight: torch.Tensor, is_own: bool) -> None:
    """Keep a weight that is not trained in float32, for checkpoints: the engine has it in half precision only.

    Args:
        weight: the whole of it, or under ZeRO-3 this rank's part.
    """
    if _is_partitioned(parameter):
        weight = _pad(parameter, weight) if is_own else _cut_own_part(parameter, weight)
    setattr(parameter, _FROZEN, weight.detach().float().cpu().clone())  # Of its own: the whole may go.


def read_moment(parameter: Any, key: str) -> torch.Tensor | Divided | None:
    """One of AdamW's moments; None before the first update. Every rank must call it.

    Args:
        key: one of `states.MOMENTS`.
    """
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    if _is_partitioned(parameter):
        own = safe_get_local_optimizer_state(parameter, key)
        return None if own is None else _divide(parameter, own)
    moment: torch.Tensor | None = safe_get_full_optimizer_state(parameter, key)
    return moment


def _divide(parameter: Any, own: torch.Tensor | None) -> Divided:
    """What this rank holds under ZeRO-3 of a weight or of what belongs to it; None for the weight itself, which is frozen."""
    own = parameter.ds_tensor.data if own is None else own
    # A group of GPUs sends nothing that lies on the host.
    return Divided(
        own.flatten().to(parameter.device), parameter.ds_shape, parameter.ds_tensor.numel(), parameter.ds_process_group
    )


def write_weight(parameter: Any, whole: torch.Tensor) -> None:
    """Set a float32 weight from the whole tensor."""
    from deepspeed.utils import safe_set_full_fp32_param

    if _is_partitioned(parameter):
        write_own_weight(parameter, _cut_own_part(parameter, whole))
    else:
        safe_set_full_fp32_param(parameter, whole)


def write_own_weight(parameter: Any, own: torch.Tensor) -> None:
    """Set this rank's part of a float32 weight under ZeRO-3 from that part, without padding."""
    from deepspeed.utils import safe_set_local_fp32_param

    safe_set_local_fp32_param(parameter, _pad(parameter, own))


def put_own_part(parameter: Any, own: torch.Tensor) -> None:
    """Set this rank's part of a weight that ZeRO-3 has divided, before the engine starts."""
    parameter.ds_tensor.data.copy_(_pad(parameter, own).view_as(parameter.ds_tensor))


def _pad(parameter: Any, own: torch.Tensor) -> torch.Tensor:
    """The last ranks' parts are padded to the size of the others, on the parameter's device. Others stay where they lie."""
    own = own if own.dtype == torch.float64 else own.float()
    missing = parameter.ds_tensor.numel() - len(own)
    own = torch.nn.functional.pad(own, (0, missing)) if missing else own  # It would copy all the same.
    return own.to(parameter.device)


def replace_weight(parameter: Any, file: TensorFiles, name: str) -> None:
    """Set a weight from a saved tensor: the float32 one, and the one of any precision that the forward uses."""
    if _is_partitioned(parameter):
        own = _read_own_part(parameter, file, name)
        write_own_weight(parameter, own)
        parameter.ds_tensor.data.copy_(own.view_as(parameter.ds_tensor))
        if parameter.data.shape == parameter.ds_shape:  # Small parameters stay gathered.
            parameter.data.copy_(file.read(name))
        return
    whole = file.read(name).to(parameter.device)
    write_weight(parameter, whole)
    parameter.data.copy_(whole)


def write_moment(parameter: Any, key: str, file: TensorFiles, name: str) -> None:
    """Set one of AdamW's moments from a saved tensor, after `create_states`."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    # ZeRO-3's setter of whole tensors fails if parts are padded.
    if _is_partitioned(parameter):
        safe_set_local_optimizer_state(parameter, _read_own_part(parameter, file, name), key)
    else:
        safe_set_full_optimizer_state(parameter, file.read(name).to(parameter.device), key)


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


def share_weights(engine_optimizer: Any) -> None:
    """Let ZeRO-3 update the weights themselves, where they have the type and the device of its own copy of them.

    In float32 DeepSpeed means to do so, but it compares a device with a device's name, which are never equal (0.19.8), and
    keeps each share twice. After a step it copies the one into the other, which does nothing if they are one.

    Args:
        engine_optimizer: DeepSpeed's wrapper, or any other optimizer, with which nothing is done.
    """
    weights = getattr(engine_optimizer, "fp16_partitioned_groups_flat", ())
    for own, copy in zip(weights, getattr(engine_optimizer, "fp32_partitioned_groups_flat", ()), strict=True):
        if own is not None and (own.dtype, own.device) == (copy.dtype, copy.device):
            copy.data = own


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
    begin, size = _find_own_part(parameter)
    return _pad(parameter, whole.flatten()[begin : begin + size])


def _read_own_part(parameter: Any, file: TensorFiles, name: str) -> torch.Tensor:
    """As `_cut_own_part`, read from a file, on the parameter's device."""
    begin, size = _find_own_part(parameter)
    return _pad(parameter, file.read_flat(name, begin, begin + size))


def _find_own_part(parameter: Any) -> tuple[int, int]:
    """Where this rank's part of a flattened parameter begins, and its size."""
    size: int = parameter.ds_tensor.numel()
    return size * torch.distributed.get_rank(), size
