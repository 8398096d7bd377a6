"""RMSNorm as torch's own operation: on a GPU one kernel forward and three backward, in place of six and some fourteen.

transformers spells this norm (Zhang and Sennrich 2019) as squares, a mean, a root and products. On a GPU each of these goes
through memory for itself, an eighth of a decoder's step (benchmarks/gpu_roof.py). On a CPU torch's operation does the same as
transformers, and in float32 gives the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_OFFSETS = (0.0, 1.0)  # Of the weights; families such as Gemma save them less one.


def install(model: torch.nn.Module) -> int:
    """Exchange the norms that torch's operation gives the same bits as. Before the model is sharded.

    Only the computation is exchanged: parameters and what is saved stay as they are.

    Returns:
        How many were exchanged.
    """
    classes: dict[tuple[Any, ...], type[torch.nn.Module] | None] = {}
    num_exchanged = 0
    for module in list(model.modules()):
        epsilon = next((name for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
        is_torchs = isinstance(module, torch.nn.RMSNorm)
        if epsilon is None or is_torchs or not _is_a_vector_alone(module) or "forward" in vars(module):
            continue
        # Two of a class may be set to compute different things.
        settings = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        key = (type(module), *sorted(settings.items()))
        if key not in classes:
            classes[key] = _derive(module, epsilon)
        derived = classes[key]
        if derived is not None:
            # Its class and not its forward: torch.compile would compile each module's own function anew.
            module.__class__ = derived
            num_exchanged += 1
    return num_exchanged


def _derive(module: Any, epsilon: str) -> type[torch.nn.Module] | None:
    """A class of the same name that computes what this module does with torch's operation; None where that is not the same."""
    own: Any = type(module)
    if len(signature(own.forward).parameters) != 2:
        return None
    random = torch.Generator().manual_seed(0)
    trial = copy.copy(module)  # With weights of any kind: the module's own may be ones, or not there yet.
    weight = torch.nn.Parameter(torch.rand(module.weight.shape, generator=random) + 0.5)
    trial._parameters = {**module._parameters, "weight": weight}
    hidden = torch.randn(3, *module.weight.shape, generator=random)
    with torch.no_grad():
        keeps_type = own.forward(trial, hidden.bfloat16()).dtype == torch.bfloat16
        for offset in _OFFSETS:
            forward = _build_forward(own, epsilon, offset, keeps_type)
            if torch.equal(own.forward(trial, hidden), forward(trial, hidden)):
                names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
                return type(own.__name__, (own,), {"forward": forward, **names})
    return None


def _build_forward(
    own: Any, epsilon: str, offset: float, keeps_type: bool
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """What a module does with torch's operation.

    Args:
        own: the module's class.
        epsilon: the name of its epsilon.
        offset: of its weights.
        keeps_type: whether inputs of half precision give outputs of it, also where weights are in float32.
    """

    def forward(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        weight = norm.weight.float() + offset if offset else norm.weight
        if hidden.dtype == weight.dtype == torch.float32:
            return F.rms_norm(hidden, weight.shape, weight, getattr(norm, epsilon))
        if norm.weight.dtype not in (hidden.dtype, torch.float32):
            return own.forward(norm, hidden)  # type: ignore[no-any-return]
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        # Autocast would convert half precision to float32 and back; the kernel computes in float32 anyway.
        with torch.autocast(hidden.device.type, enabled=False):
            found = F.rms_norm(hidden.to(dtype), weight.shape, weight.to(dtype), getattr(norm, epsilon))
        return found.to(hidden.dtype if keeps_type else dtype)

    return forward


def _is_a_vector_alone(module: torch.nn.Module) -> bool:
    """Whether a module has a vector of weights, and no other tensor or module."""
    parameters = dict(module.named_parameters())
    has_more = next(module.buffers(), None) is not None or next(module.children(), None) is not None
    return [(name, each.dim()) for name, each in parameters.items()] == [("weight", 1)] and not has_more
