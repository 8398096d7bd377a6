"""Weights and AdamW's moments by parameter name, gathered from and given back to every strategy.

Tensors are gathered one at a time, so that no process but the one that keeps them ever holds a whole state. One process,
DDP and FSDP2 hold plain tensors and DTensors; DeepSpeed is asked through its accessors of whole tensors and, under
ZeRO-3, of local parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from onecurve.training.errors import BadInput

MOMENTS = ("exp_avg", "exp_avg_sq")

Tensors = dict[str, torch.Tensor]
NamedTensors = Iterator[tuple[str, torch.Tensor]]


def count_state_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights, buffers and moments of a model that is not prepared yet."""
    weights: int = sum(value.nbytes for value in model.state_dict().values())
    trained: int = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    return weights + len(MOMENTS) * trained


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Put a checkpoint's weights into a model that is not prepared yet, under any strategy.

    Raises:
        BadInput: the checkpoint is of another model.
    """
    own = model.state_dict()
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        if names := set(own) ^ set(file.keys()):
            raise BadInput(f"{checkpoint} is of another model: only one of them has {', '.join(sorted(names)[:5])}")
        for name, value in own.items():
            saved = file.get_tensor(name)
            if saved.shape != value.shape:
                raise BadInput(
                    f"{checkpoint} is of another model: {name} has shape {list(saved.shape)} there, "
                    f"{list(value.shape)} here"
                )
            value.copy_(saved)


def whole_weights(accelerator: Accelerator, model: torch.nn.Module) -> NamedTensors:
    """Each weight and saved buffer, whole; all processes must go through all of them."""
    for name, value in unwrap(model).state_dict(keep_vars=True).items():
        whole = value
        if accelerator.distributed_type == DistributedType.DEEPSPEED and isinstance(value, torch.nn.Parameter):
            from deepspeed.utils import safe_get_full_fp32_param

            master = safe_get_full_fp32_param(value)
            whole = value if master is None else master
        yield _plain(name), _whole(whole)


def whole_moments(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> NamedTensors:
    """Each of AdamW's moments as "<name>.exp_avg", whole; all processes must go through all of them."""
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if uses_deepspeed:
        _link_states(optimizer)
    states = _torch_optimizer(optimizer).state
    for name, parameter in unwrap(model).named_parameters():
        for key in MOMENTS:
            if uses_deepspeed:
                from deepspeed.utils import safe_get_full_optimizer_state

                moment = safe_get_full_optimizer_state(parameter, key)
            else:
                moment = states[parameter].get(key) if parameter in states else None
            if moment is not None:
                yield f"{_plain(name)}.{key}", _whole(moment)


def unwrap(model: torch.nn.Module) -> Any:
    """The model inside DDP's or DeepSpeed's wrapper; accelerate's own way imports DeepSpeed, which takes seconds."""
    return getattr(model, "module", model)


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _whole(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def count_updates(optimizer: Any) -> float:
    """How often AdamW has stepped; it corrects the moments' bias by it."""
    for state in _torch_optimizer(optimizer).state.values():
        if "step" in state:
            return float(state["step"])
    return 0.0


def _link_states(optimizer: Any) -> None:
    """Let DeepSpeed's getters and setters find the moments of every parameter group.

    ZeRO-1 and 2 link them once, after the first group has stepped and before the others have a state (0.19.8).
    """
    engine_optimizer = optimizer.optimizer
    if hasattr(engine_optimizer, "_hp_optimizer_states_linked"):
        engine_optimizer._hp_optimizer_states_linked = False
        engine_optimizer._lazy_init_hp_params_optimizer_state()


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The AdamW inside accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.AdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def load_moments(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, checkpoint: Path, step: float
) -> None:
    """Put a checkpoint's moments into a prepared optimizer, under any strategy and number of processes.

    Args:
        step: updates that AdamW had made.
    """
    inner = _torch_optimizer(optimizer)
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        names = set(file.keys())
        if not names:
            return
        uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if uses_deepspeed:
            _make_states_deepspeed(optimizer, step)
        for name, parameter in unwrap(model).named_parameters():
            if f"{_plain(name)}.{MOMENTS[0]}" not in names:
                continue
            moments = {key: file.get_tensor(f"{_plain(name)}.{key}").to(parameter.device) for key in MOMENTS}
            if uses_deepspeed:
                _set_moments_deepspeed(parameter, moments)
                continue
            if isinstance(parameter, DTensor):  # Each process cuts its own part; nothing is sent.
                mesh, placements = parameter.device_mesh, parameter.placements
                moments = {
                    key: distribute_tensor(whole, mesh, placements, src_data_rank=None)
                    for key, whole in moments.items()
                }
            # The fused AdamW counts its steps on the parameter's device.
            inner.state[parameter] = {
                "step": torch.tensor(step, dtype=torch.float32, device=parameter.device),
                **moments,
            }


def _make_states_deepspeed(optimizer: Any, step: float) -> None:
    """Let AdamW have its state, which it makes at its first step; the engine's setters need it to be there.

    Its keys are the flat float32 partitions, which have another name in each stage.
    """
    engine_optimizer, inner = optimizer.optimizer, _torch_optimizer(optimizer)
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        for flat in getattr(engine_optimizer, name, ()):
            state = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat] = {
                "step": torch.tensor(step) if isinstance(inner, torch.optim.AdamW) else int(step),
                **state,
            }
    _link_states(optimizer)


def _set_moments_deepspeed(parameter: Any, moments: Tensors) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for key, whole in moments.items():
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3; its setter of whole tensors fails where the parts are padded.
            safe_set_local_optimizer_state(parameter, _own_part(parameter, whole), key)
        else:
            safe_set_full_optimizer_state(parameter, whole, key)


def _own_part(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter under ZeRO-3."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padded = torch.nn.functional.pad(whole.flatten(), (0, size * torch.distributed.get_world_size()))
    return padded.narrow(0, size * rank, size)


def keep_exact_weights(accelerator: Accelerator, model: torch.nn.Module) -> Tensors:
    """The float32 weights of a model that is not prepared yet, where they would be lost; else none.

    DeepSpeed in bf16 and fp16 rounds a model's weights when it is prepared, and makes the ones that it updates from those:
    the pretrained model would be another one than elsewhere, and each start would lose what was learned in steps smaller
    than the rounding.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.mixed_precision == "no":
        return {}
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def give_exact_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """Give DeepSpeed what `keep_exact_weights` kept, once it has prepared the model."""
    if not weights:
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in unwrap(model).named_parameters():
        whole = weights[_plain(name)].to(parameter.device)
        if hasattr(parameter, "ds_tensor"):
            safe_set_local_fp32_param(parameter, _own_part(parameter, whole))
        else:
            safe_set_full_fp32_param(parameter, whole)
