"""Weights and AdamW's moments by parameter name, gathered from and given back to every strategy.

One process, DDP and FSDP2 go through PyTorch's own state dicts; DeepSpeed through its accessors of whole tensors and,
under ZeRO-3, of local parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from training.faults import BadInput

MOMENTS = ("exp_avg", "exp_avg_sq")

Tensors = dict[str, torch.Tensor]


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Put a checkpoint's weights into a model that is not prepared yet, under any strategy.

    Raises:
        BadInput: the checkpoint is of another model.
    """
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except RuntimeError as error:
        raise BadInput(f"{checkpoint} is of another model: {' '.join(str(error).split())[:300]}") from None


def gather_weights(accelerator: Accelerator, model: torch.nn.Module) -> Tensors:
    """Whole float32 weights by name, on the host; complete on rank 0, empty or complete on the others."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in model.module.named_parameters():  # type: ignore[union-attr]
            whole = safe_get_full_fp32_param(parameter)
            weights[name] = (parameter.detach() if whole is None else whole).cpu().clone()
        weights.update({name: buffer.cpu().clone() for name, buffer in _saved_buffers(accelerator, model).items()})
        return weights
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole_weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return _own(whole_weights)


def _saved_buffers(accelerator: Accelerator, model: torch.nn.Module) -> Tensors:
    inner = accelerator.unwrap_model(model)
    parameters = dict(inner.named_parameters())
    return {name: value for name, value in inner.state_dict().items() if name not in parameters}


def gather_moments(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> tuple[Tensors, float]:
    """AdamW's whole moments as "<name>.exp_avg" and the number of its updates; complete on rank 0."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_optimizer_state

        _link_states(optimizer)
        moments = {}
        for name, parameter in model.module.named_parameters():  # type: ignore[union-attr]
            for key in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, key)
                if whole is not None:
                    moments[f"{name}.{key}"] = whole.float().cpu().clone()
        return moments, _read_optimizer_step(_torch_optimizer(optimizer))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states: dict[str, Any] = get_optimizer_state_dict(model, _torch_optimizer(optimizer), options=options)
    moments = {
        f"{name}.{key}": value[key]
        for name, value in states.get("state", {}).items()
        for key in MOMENTS
        if key in value
    }
    return _own(moments), _read_optimizer_step(_torch_optimizer(optimizer))


def _link_states(optimizer: Any) -> None:
    """Let DeepSpeed's getters and setters find the moments of every parameter group.

    ZeRO-1 and 2 link them once, after the first group has stepped and before the others have a state (0.19.8).
    """
    engine_optimizer = optimizer.optimizer
    if hasattr(engine_optimizer, "_hp_optimizer_states_linked"):
        engine_optimizer._hp_optimizer_states_linked = False
        engine_optimizer._lazy_init_hp_params_optimizer_state()


def _own(tensors: Tensors) -> Tensors:
    """Contiguous copies on the host: safetensors refuses tensors that share memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The AdamW inside accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.AdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _read_optimizer_step(optimizer: torch.optim.Optimizer) -> float:
    for state in optimizer.state.values():
        if "step" in state:
            return float(state["step"])
    return 0.0


def load_moments(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, checkpoint: Path, step: float
) -> None:
    """Put a checkpoint's moments into a prepared optimizer, under any strategy and number of processes.

    Args:
        step: updates that AdamW had made; it corrects the moments' bias by it.
    """
    moments = load_file(checkpoint / "optimizer.safetensors")
    if not moments:
        return
    inner = _torch_optimizer(optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _load_moments_deepspeed(model, optimizer, moments, step)
        return
    names = sorted({name.rpartition(".")[0] for name in moments})
    state: Any = {
        name: {"step": torch.tensor(step), **{key: moments[f"{name}.{key}"] for key in MOMENTS}} for name in names
    }
    groups = get_optimizer_state_dict(model, inner, options=StateDictOptions(full_state_dict=True))["param_groups"]
    set_optimizer_state_dict(
        model,
        inner,
        optim_state_dict={"state": state, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )


def _load_moments_deepspeed(model: torch.nn.Module, optimizer: Any, moments: Tensors, step: float) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    engine_optimizer, inner = optimizer.optimizer, _torch_optimizer(optimizer)
    # AdamW makes its state at its first step; the engine's setters need it to be there. Its keys are the flat float32
    # partitions, which have another name in each stage.
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        for flat in getattr(engine_optimizer, name, ()):
            state = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat] = {
                "step": torch.tensor(step) if isinstance(inner, torch.optim.AdamW) else int(step),
                **state,
            }
    _link_states(optimizer)
    for name, parameter in model.module.named_parameters():  # type: ignore[union-attr]
        for key in MOMENTS:
            if f"{name}.{key}" not in moments:
                continue
            whole = moments[f"{name}.{key}"].to(parameter.device)
            if hasattr(parameter, "ds_tensor"):  # ZeRO-3; its setter of whole tensors fails where the parts are padded.
                size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
                padded = torch.nn.functional.pad(whole.flatten(), (0, size * torch.distributed.get_world_size()))
                safe_set_local_optimizer_state(parameter, padded.narrow(0, size * rank, size), key)
            else:
                safe_set_full_optimizer_state(parameter, whole, key)
