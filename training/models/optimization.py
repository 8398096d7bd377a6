"""AdamW without decay on biases and norms, and a schedule that counts steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from onecurve.training.config import Recipe
from onecurve.training.models.depths import count_layers_above

_NUMBERS_PER_NORM = 4096


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with decoupled decay on weight matrices and embeddings only.

    With layerwise_lr_decay, the learning rate falls by this factor from each layer to the one below it (Howard and Ruder
    2018; the rates are those of BEiT, Bao et al. 2022). The first group has the highest rate.

    Raises:
        BadInput: layerwise_lr_decay, and the model has no layers.
    """
    return torch.optim.AdamW(
        _build_groups(model, recipe),
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )


def _build_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    is_layerwise = recipe.layerwise_lr_decay != 1
    above = count_layers_above(model) if is_layerwise else dict.fromkeys((name for name, _ in trained), 0)
    groups: list[dict[str, Any]] = []
    for depth in sorted({above[name] for name, _ in trained}):
        rate = {"lr": recipe.learning_rate * recipe.layerwise_lr_decay**depth} if is_layerwise else {}
        of_depth = [parameter for name, parameter in trained if above[name] == depth]
        # Biases and the weights of norms are vectors. To decay them would shrink activations, not regularize.
        decayed = [parameter for parameter in of_depth if parameter.ndim >= 2]
        undecayed = [parameter for parameter in of_depth if parameter.ndim < 2]
        groups.append({"params": decayed, "weight_decay": recipe.weight_decay, **rate})
        groups.append({"params": undecayed, "weight_decay": 0.0, **rate})
    # A checkpoint's schedule has a rate for each group, so without layers there are two, one of them empty at times.
    return [group for group in groups if group["params"]] if is_layerwise else groups


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, num_steps: int) -> Any:
    """The schedule, to be stepped once per update. Do not prepare it: accelerate would step it once per process."""
    num_warmup_steps = recipe.num_warmup_steps or math.ceil(recipe.warmup_ratio * num_steps)
    specific: dict[str, Any] = {}
    if recipe.lr_scheduler_type in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        specific["min_lr_rate"] = 0.1
    if recipe.lr_scheduler_type == "warmup_stable_decay":
        specific["num_decay_steps"] = max(1, num_steps // 10)
    if recipe.lr_scheduler_type == "polynomial":
        # transformers ends at 1e-7 and refuses lower rates, and divides by the number of steps after warm-up.
        specific["lr_end"] = min(1e-7, recipe.learning_rate / 10)
        num_steps = max(num_steps, num_warmup_steps + 1)
    return get_scheduler(
        recipe.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=specific,
    )


def needs_metric(recipe: Recipe) -> bool:
    """Whether the schedule steps after each evaluation, by its loss, instead of after each step."""
    return recipe.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_grad_norm: float) -> torch.Tensor:
    """Clip by the global norm, and return the norm before clipping; it is the same under every strategy.

    Under DeepSpeed, the engine has clipped already, in `backward`; only its norm is read here.
    """
    if accelerator.device.type == "cpu" and accelerator.distributed_type != DistributedType.DEEPSPEED:
        return _clip_on_a_cpu(accelerator, model, max_grad_norm or math.inf)
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    if _has_overflown(accelerator):
        norm = math.inf  # The engine skipped the step, and keeps the norm of an earlier one.
    if accelerator.distributed_type == DistributedType.FSDP:
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if isinstance(norm, torch.Tensor):
        return norm.to(accelerator.device)
    return torch.full((), norm, device=accelerator.device)  # Unlike a copy, this does not wait for the device.


def _clip_on_a_cpu(accelerator: Accelerator, model: torch.nn.Module, max_grad_norm: float) -> torch.Tensor:
    """What `torch.nn.utils.clip_grad_norm_` does, with a norm that does not depend on how a strategy divides tensors.

    Torch's norm of a float32 tensor adds up its numbers one behind the other on a CPU: of the two million gradients of an
    output layer it was wrong by 1e-3, of halves of it by less.
    """
    accelerator.unscale_gradients()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
    squares = torch.stack([measure_norm(each).square() for each in parts]).sum()
    if accelerator.distributed_type == DistributedType.FSDP:
        # Of hybrid sharding, each group of processes has all gradients between them.
        sizes = accelerator.parallelism_config
        squares = accelerator.reduce(squares) / (1 if sizes is None else sizes.dp_replicate_size)
    norm = squares.sqrt()
    if max_grad_norm < math.inf:
        torch._foreach_mul_(parts, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm.to(parts[0].dtype)


def measure_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Euclidean norm in float64, from norms of a few thousand numbers each, of which a CPU adds up few enough exactly."""
    flat = tensor.detach().flatten()
    num_in_rows = len(flat) // _NUMBERS_PER_NORM * _NUMBERS_PER_NORM
    rows = torch.linalg.vector_norm(flat[:num_in_rows].view(-1, _NUMBERS_PER_NORM), dim=1)
    rest = torch.linalg.vector_norm(flat[num_in_rows:])
    norm: torch.Tensor = torch.linalg.vector_norm(torch.cat([rows, rest[None]]), dtype=torch.float64)
    return norm


def _has_overflown(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed skipped this step of fp16, because gradients overflowed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.mixed_precision != "fp16":
        return False
    return bool(accelerator.deepspeed_engine_wrapped.engine.optimizer.overflow)
