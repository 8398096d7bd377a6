"""How far each parameter lies below a model's output: what a learning rate for each depth goes by."""

from __future__ import annotations

from typing import Any

import torch

from onecurve.training.errors import BadInput


def count_layers_above(model: Any) -> dict[str, int]:
    """For each parameter's name: 0 for the head and what follows the last layer, 1 for the last layer, 2 for the one below.

    The embeddings have one more than the first layer. A stack, such as an encoder and its decoder, counts its own layers. An
    output layer that is tied to the embeddings is one tensor with them, and has their number.

    Args:
        model: of transformers, not prepared.

    Raises:
        BadInput: no repeated layers are found in it.
    """
    body = model.base_model
    prefix = "" if body is model else f"{model.base_model_prefix}."
    above = {
        f"{prefix}{name}.{index}.": len(layers) - index
        for name, layers in list_stacks(body).items()
        for index in range(len(layers))
    }
    if not above:
        raise BadInput(
            f"layerwise_lr_decay: {type(model).__name__} has no list of layers that a depth could be counted in; remove it"
        )
    embeddings = {f"{prefix}{name}." for name, module in body.named_modules() if isinstance(module, torch.nn.Embedding)}
    return {name: _count_above(name, prefix, above, embeddings) for name, _ in model.named_parameters()}


def list_stacks(body: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """The outermost lists of modules; the experts of a layer are a list inside one."""
    lists = {name: module for name, module in body.named_modules() if isinstance(module, torch.nn.ModuleList)}
    return {name: each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}


def _count_above(name: str, prefix: str, above: dict[str, int], embeddings: set[str]) -> int:
    for layer, count in above.items():
        if name.startswith(layer):
            return count
    if not name.startswith(prefix):  # The head.
        return 0
    # Besides tables: their norms and projections, which families call embeddings.LayerNorm, layernorm_embedding, mask_emb.
    is_embedding = "emb" in name.removeprefix(prefix) or any(name.startswith(each) for each in embeddings)
    return 1 + max(above.values()) if is_embedding else 0
