"""Every dropout of a model gets its masks by example: dropout modules, dropout that a model calls as a function, and attention.

`torch.nn.functional.dropout` and `scaled_dot_product_attention` are exchanged once in a process. They ask example_masks.py for
masks while a forward of known examples is computed, and are torch's own at any other time. What draws random numbers in
another way is found at the start (mask_trial.py).
"""

from __future__ import annotations

import functools

import torch

from onecurve.training.config import Recipe
from onecurve.training.models import matrix_attention
from onecurve.training.models.example_masks import open_site

KERNELS_WITH_DROPOUT = ("flash_attention_2", "flash_attention_3")
"""Attentions whose dropout is inside of a kernel: their masks can't be by example."""

_dropout = torch.nn.functional.dropout
_attention = torch.nn.functional.scaled_dot_product_attention


def install(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> bool:
    """Draw all of a model's dropout by example, unless the recipe wants torch's masks.

    On a CPU, attention is exchanged as well, where it can be, is faster as matrices and the recipe names none.

    Returns:
        Whether the masks are by example.
    """
    if recipe.dropout_masks != "by_example":
        return False
    intercept()
    has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    can_replace = getattr(model, "_supports_sdpa", False) and model._can_set_attn_implementation()  # type: ignore[operator]
    gains = device.type == "cpu" and not recipe.torch_compile and (has_dropout or recipe.mixed_precision == "bf16")
    if recipe.attn_implementation is None and can_replace and gains:
        matrix_attention.install(model)
    return True


def intercept() -> None:
    """Exchange torch's dropout and attention in this process; without a forward of known examples they are torch's still."""
    torch.nn.functional.dropout = drop
    torch.nn.functional.scaled_dot_product_attention = attend


@functools.wraps(_dropout)
def drop(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """As torch's dropout, with masks by example while a forward of known examples is computed."""
    if training and 0 < p < 1:
        return _drop_by_example(input, p, inplace)  # type: ignore[no-any-return]
    dropped: torch.Tensor = _dropout(input, p, training, inplace)
    return dropped


@functools.wraps(_attention)
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch's attention, with masks by example while a forward of known examples is computed."""
    if dropout_p > 0:
        return _attend_by_example(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


# Compiled code can't count sites: torch.compile breaks its graph at each of these.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _drop_by_example(input: torch.Tensor, p: float, inplace: bool) -> torch.Tensor:
    site = open_site()
    if site is None:
        return _dropout(input, p, True, inplace)
    dropped = matrix_attention.drop_elements(input, site.draw(input.shape, p, input.device), p)
    return input.copy_(dropped) if inplace else dropped


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_example(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    site = open_site() if query.dim() == 4 else None
    if site is None:
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    mask, lowest = attn_mask, torch.finfo(query.dtype).min
    if is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return matrix_attention.attend_by_example(query, key, value, mask, scale, dropout_p, site)
