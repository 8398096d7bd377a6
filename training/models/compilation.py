"""torch.compile of a model's repeated layers, for sequences of any length."""

from __future__ import annotations

from typing import Any

from onecurve.training.errors import BadInput
from onecurve.training.models import attention
from onecurve.training.models.depths import list_stacks

BACKEND = "inductor"


def compile_layers(model: Any) -> None:
    """Let each layer be compiled when it first runs. Before the model is sharded.

    All layers share a compilation. Sizes are symbols in it from the start: torch would else compile for the first length,
    once more for any length, and again for another number of examples. The rest of the model runs as it is: head, norms and
    dropout would be compiled under one name, each anew, until torch's limit of recompilations ends them all.

    Raises:
        BadInput: no repeated layers are found.
    """
    stacks = list_stacks(model.base_model)
    if not stacks:
        raise BadInput(f"torch_compile: {type(model).__name__} has no list of layers that could be compiled; remove it")
    attention.hide_lengths(model.base_model)
    for layers in stacks.values():
        for layer in layers:
            layer.compile(backend=BACKEND, dynamic=True)
