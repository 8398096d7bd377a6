"""Weights and AdamW's moments by parameter name, gathered from and loaded into every strategy.

Of a tensor that is divided each rank has its part, which goes to the one that keeps the tensor (gathering.py). One process,
DDP and FSDP2 have plain tensors and DTensors; deepspeed_states.py has DeepSpeed's way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from onecurve.training.errors import BadInput, Fault
from onecurve.training.models.adapters import has_adapter
from onecurve.training.models.shares import Shares, is_reserved
from onecurve.training.models.tensor_files import TensorFiles
from onecurve.training.parallel import deepspeed_states
from onecurve.training.parallel.gathering import Divided, divide
from onecurve.training.run_directory import MOMENTS_FILE, WEIGHTS_FILE

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of its moments."""

Tensors = dict[str, torch.Tensor]
States = Iterator[tuple[str, torch.Tensor | Divided]]
"""By name, whole or divided."""


def count_state_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights, buffers and moments of a model that is not prepared yet."""
    weights: int = sum(value.nbytes for _, value in _list_saved(model))
    trained: int = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    return weights + len(MOMENTS) * trained


def count_weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights and buffers that a checkpoint holds, in float32, of a model that may be divided."""
    return sum(_count_float32_bytes(value) for _, value in _list_saved(model))


def count_largest_bytes(model: torch.nn.Module) -> int:
    """Bytes of the largest weight, whole and in float32, of a prepared model that may be divided."""
    return max(_count_float32_bytes(value) for value in unwrap(model).parameters())


def _count_float32_bytes(value: torch.Tensor) -> int:
    return 4 * int(getattr(value, "ds_numel", value.numel()))


def count_checkpoint_bytes(model: torch.nn.Module) -> int:
    """Bytes of a checkpoint's weights, buffers and moments, in float32, of a prepared model that may be divided."""
    inner = unwrap(model)
    trained = sum(_count_float32_bytes(each) for each in inner.parameters() if each.requires_grad)
    return count_weight_bytes(inner) + len(MOMENTS) * trained


def load_weights(checkpoint: Path, model: torch.nn.Module, shares: Shares | None = None) -> None:
    """Load a checkpoint's weights into a model that is not prepared yet, under any strategy.

    Args:
        shares: takes this process's parts of those weights of which it has parts.

    Raises:
        BadInput: the checkpoint is of another model.
    """
    own = {name: value.detach() for name, value in _list_saved(model)}
    parts = {} if shares is None else shares.parts
    with TensorFiles(checkpoint / WEIGHTS_FILE) as file:
        # Earlier versions wrote a tied weight once for each of its names.
        others = model.state_dict(keep_vars=True).keys() if not has_adapter(model) else own.keys()
        if names := (own.keys() - file.names()) | (file.names() - others):
            raise BadInput(f"{checkpoint} is of another model: only one of them has {', '.join(sorted(names)[:5])}")
        for name, value in own.items():
            if file.shape(name) != value.shape:
                raise BadInput(
                    f"{checkpoint} is of another model: {name} has shape {list(file.shape(name))} there, "
                    f"{list(value.shape)} here"
                )
            if shares is not None and name in parts:
                parts[name] = shares.cut.read(file, name)
            elif not is_reserved(value):
                value.copy_(file.read(name))


def set_shares(model: torch.nn.Module, shares: Shares | None) -> None:
    """Under FSDP2, put this process's parts into a prepared model, and let go of them.

    Raises:
        Fault: one belongs to no weight of it.
    """
    if shares is None or shares.cut.is_flat:
        return
    with torch.no_grad():
        for name, parameter in unwrap(model).named_parameters():
            if _plain(name) in shares.parts:
                parameter.to_local().copy_(shares.parts.pop(_plain(name)))
    if shares.parts:  # Those weights would stay zero.
        raise Fault(f"weights were read that the divided model does not have: {', '.join(sorted(shares.parts)[:3])}")


def _list_saved(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of a model that is not wrapped. An adapter's base is named in the run instead.

    A tied weight is listed once, under the name that `named_parameters` gives it, as its moments are.
    """
    is_frozen, listed = has_adapter(model), set()
    for name, value in model.state_dict(keep_vars=True).items():
        is_base = is_frozen and isinstance(value, torch.nn.Parameter) and not value.requires_grad
        if not is_base and id(value) not in listed:
            listed.add(id(value))
            yield name, value


def list_weights(accelerator: Accelerator, model: torch.nn.Module) -> States:
    """Each weight and saved buffer; with an adapter only what is trained. Every rank must iterate over all of them."""
    for name, value in _list_saved(unwrap(model)):
        if _uses_deepspeed(accelerator) and isinstance(value, torch.nn.Parameter):
            yield _plain(name), deepspeed_states.read_weight(value)
        else:
            yield _plain(name), _read(value)


def list_moments(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> States:
    """Each of AdamW's moments as "<name>.exp_avg". Every rank must iterate over all of them."""
    if _uses_deepspeed(accelerator):
        deepspeed_states.link_states(optimizer.optimizer)
    states = _torch_optimizer(optimizer).state
    for name, parameter in unwrap(model).named_parameters():
        for key in MOMENTS:
            if _uses_deepspeed(accelerator):
                moment = deepspeed_states.read_moment(parameter, key)
            else:
                moment = _read(states[parameter][key]) if key in states.get(parameter, {}) else None
            if moment is not None:
                yield f"{_plain(name)}.{key}", moment


def count_updates(optimizer: Any) -> float:
    """How many updates AdamW has made; it corrects the bias of the moments by this number."""
    for state in _torch_optimizer(optimizer).state.values():
        if "step" in state:
            return float(state["step"])
    return 0.0


def load_moments(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, checkpoint: Path, step: float
) -> None:
    """Load a checkpoint's moments into a prepared optimizer, under any strategy and number of processes.

    Args:
        step: updates that AdamW had made.
    """
    inner = _torch_optimizer(optimizer)
    with TensorFiles(checkpoint / MOMENTS_FILE) as file:
        names = file.names()
        if not names:
            return
        if _uses_deepspeed(accelerator):
            deepspeed_states.create_states(optimizer.optimizer, inner, step, MOMENTS)
        for name, parameter in unwrap(model).named_parameters():
            if f"{_plain(name)}.{MOMENTS[0]}" not in names:
                continue
            if _uses_deepspeed(accelerator):
                for key in MOMENTS:
                    deepspeed_states.write_moment(parameter, key, file, f"{_plain(name)}.{key}")
                continue
            # The fused AdamW needs its counter on the device of the weights.
            inner.state[parameter] = {
                "step": torch.tensor(step, dtype=torch.float32, device=parameter.device),
                **{key: _read_like(parameter, file, f"{_plain(name)}.{key}") for key in MOMENTS},
            }


def _read_like(value: torch.Tensor, file: TensorFiles, name: str) -> torch.Tensor:
    """A saved tensor, divided as `value` is: each rank reads its own part of it, and nothing is sent."""
    if not isinstance(value, DTensor):
        return file.read(name).to(value.device)
    size, begin = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    part = file.read_part(name, tuple(begin), tuple(size)).to(value.device)
    whole: torch.Tensor = DTensor.from_local(
        part, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    return whole


def keep_exact_weights(accelerator: Accelerator, model: torch.nn.Module, shares: Shares | None = None) -> Tensors:
    """The float32 weights of a model that is not prepared yet, if preparing it rounds them; else none.

    In bf16 and fp16, DeepSpeed rounds a model's weights when it is prepared, and makes its float32 weights from the rounded
    ones. So the pretrained model would differ from that of other strategies, and each start would lose updates that are
    smaller than the rounding.
    """
    if not _uses_deepspeed(accelerator) or accelerator.mixed_precision == "no":
        return {}
    parts = {} if shares is None else shares.parts
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name not in parts} | parts


def set_exact_weights(model: torch.nn.Module, weights: Tensors, shares: Shares | None = None) -> None:
    """Set the weights that `keep_exact_weights` kept, after DeepSpeed has prepared the model."""
    if not weights:
        return
    saved = {name for name, _ in _list_saved(unwrap(model))}
    for name, parameter in unwrap(model).named_parameters():
        weight = weights[_plain(name)]
        is_own = shares is not None and _plain(name) in shares.parts
        if not parameter.requires_grad:
            if name in saved:  # Or it is the base of an adapter.
                deepspeed_states.keep_frozen(parameter, weight, is_own)
        elif is_own:
            deepspeed_states.write_own_weight(parameter, weight)
        else:
            deepspeed_states.write_weight(parameter, weight.to(parameter.device))


def replace_weights(checkpoint: Path, accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Replace the weights of a prepared model by a checkpoint's, under any strategy. Every rank must call it.

    The moments stay those of the last step: the model can be evaluated and saved afterwards, and not be trained on.
    """
    with torch.no_grad(), TensorFiles(checkpoint / WEIGHTS_FILE) as file:
        for name, value in _list_saved(unwrap(model)):
            if _uses_deepspeed(accelerator) and isinstance(value, torch.nn.Parameter):
                deepspeed_states.replace_weight(value, file, _plain(name))
            else:
                value.copy_(_read_like(value, file, _plain(name)))


def unwrap(model: torch.nn.Module) -> Any:
    """The model inside DDP's or DeepSpeed's wrapper. accelerate's `unwrap_model` imports DeepSpeed, which takes seconds."""
    return getattr(model, "module", model)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether all processes must run the same number of forwards: each may need weights that another one has."""
    kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return accelerator.num_processes > 1 and accelerator.distributed_type in kinds


def lies_in_host_memory(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Whether weights are divided among processes and lie in the memory of their hosts: on a CPU, or offloaded by FSDP2."""
    return is_sharded(accelerator) and next(unwrap(model).parameters()).device.type == "cpu"


def _uses_deepspeed(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def _plain(name: str) -> str:
    """A parameter's name without the prefix that torch.compile adds."""
    return name.replace("_orig_mod.", "")


def _read(value: torch.Tensor) -> torch.Tensor | Divided:
    value = value.detach()
    if not isinstance(value, DTensor):
        return value
    return divide(value) or value.full_tensor()


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The AdamW inside accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.AdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
