"""Attention as matrix products, with dropout by example: for a CPU, and wherever a mask of its own is needed.

On a CPU SDPA has no fast kernel with dropout or in bf16; on every device its dropout draws masks that depend on the
micro-batch. Here the attention's weights are computed as matrices, and the masks come from example_masks.py. Only computation
is replaced, never a parameter: the saved model is a plain transformers model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onecurve.training.models.example_masks import Site, open_site

ATTENTION = "onecurve_matrices"
"""The name under which transformers finds the attention below."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def install(model: Any) -> None:
    """Give a model this attention, if its attention can be exchanged."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, build_attention_mask)
    model.set_attn_implementation(ATTENTION)


def keep(values: torch.Tensor, kept: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`values`, with zeros for the elements that are dropped.

    Args:
        values: any shape, contiguous, of 2, 4 or 8 bytes a number.
        kept: of the same shape, integers of which all bits are set for what is kept, and none for what is dropped.
    """
    integers = _INTEGERS[values.element_size()]
    target = torch.empty_like(values) if out is None else out
    torch.bitwise_and(values.view(integers), kept.to(integers), out=target.view(integers))
    return target


class _Attention(torch.autograd.Function):
    """dropout(softmax(queries keys^T scale + mask)) values, as separate operations.

    Queries, keys and values [examples, heads, length, head size] are made contiguous once for all six matrix products;
    `matmul` would copy them for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        probability: float,
        site: Site | None,
        first_row: int | None,
    ) -> torch.Tensor:
        shape = queries.shape
        ctx.scale, ctx.dropout_scale = scale, 1 / (1 - probability)
        queries = lay_out(queries, scale)
        keys, values = lay_out(keys), lay_out(values, ctx.dropout_scale if site is not None else None)
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if mask is not None:
            _add_mask(scores.view(*shape[:3], -1), mask)
        weights = softmax(scores)
        kept, dropped = None, weights
        if site is not None:
            kept = site.draw((*shape[:3], keys.shape[1]), probability, weights.device, first_row).view(weights.shape)
            dropped = keep(weights, kept)
        ctx.save_for_backward(queries, keys, values, weights, kept, dropped)
        return torch.bmm(dropped, values).view(*shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, weights, kept, dropped = ctx.saved_tensors
        outer = gradient.shape[:2]  # Examples and heads.
        gradient = lay_out(gradient)
        of_values = torch.bmm(dropped.transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, values.transpose(1, 2))
        if kept is not None:
            of_values.mul_(ctx.dropout_scale)
            keep(of_weights, kept, out=of_weights)
        of_scores = softmax_backward(of_weights, weights)
        of_queries = torch.bmm(of_scores, keys).mul_(ctx.scale)
        of_keys = torch.bmm(of_scores.transpose(1, 2), queries)
        return (
            *(tensor.view(*outer, *tensor.shape[1:]) for tensor in (of_queries, of_keys, of_values)),
            *(None,) * 5,
        )


def _is_narrow(weights: torch.Tensor) -> bool:
    """Whether a row is shorter than one vector register of bfloat16: torch's bfloat16 softmax is then not vectorized."""
    return weights.dtype == torch.bfloat16 and weights.shape[-1] < 32


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in the type of the scores."""
    if _is_narrow(scores):
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    return torch.softmax(scores, dim=-1)


def softmax_backward(gradient: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The gradient of the scores, given that of the weights that `softmax` made of them."""
    if _is_narrow(weights):
        of_scores = torch.ops.aten._softmax_backward_data(gradient.float(), weights.float(), -1, torch.float32)
        return of_scores.to(weights.dtype)  # type: ignore[no-any-return]
    return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)  # type: ignore[no-any-return]


def lay_out(tensor: torch.Tensor, factor: float | None = None) -> torch.Tensor:
    """[examples, heads, length, size] as a contiguous [examples x heads, length, size], times a factor, in one pass."""
    if factor is None:
        return tensor.contiguous().flatten(0, 1)
    return torch.mul(tensor, factor, out=torch.empty(tensor.shape, dtype=tensor.dtype)).flatten(0, 1)


def _add_mask(scores: torch.Tensor, mask: torch.Tensor) -> None:
    """Add a mask that broadcasts to them to scores [examples, heads, queries, keys], in place."""
    num_examples, num_keys = scores.shape[0], scores.shape[-1]
    if mask.shape[:-1] == (num_examples, 1, 1) and num_keys > num_examples:
        # Padding of a few long texts: write only the padded columns.
        for example, hidden in enumerate(mask[:, 0, 0] < 0):
            columns = hidden.nonzero().flatten()
            if len(columns):
                scores[example].index_fill_(-1, columns, torch.finfo(scores.dtype).min)
        return
    scores.add_(_narrow(mask, scores.dtype))


def _narrow(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a mask. In bfloat16, float32's lowest number is -inf, and a row of -inf gives NaN, so it is clamped."""
    return mask.clamp(min=max(torch.finfo(dtype).min, torch.finfo(mask.dtype).min)).to(dtype)


def attend_by_example(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    probability: float,
    site: Site | None,
    first_row: int | None = None,
) -> torch.Tensor:
    """dropout(softmax(query key^T scale + mask)) value; [examples, heads, queries, head size].

    Args:
        query, key, value: [examples, heads, length, head size]; keys and values may have fewer heads.
        mask: something that broadcasts to [examples, heads, queries, keys], 0 or very negative.
        probability: of an attention weight to be dropped.
        site: draws what is dropped; None drops nothing.
        first_row: as in `ExampleMasks.draw`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    is_plain = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    if _is_on_host(query) and is_plain and (mask is None or not mask.requires_grad):
        return _Attention.apply(query, key, value, mask, scale, probability, site, first_row)  # type: ignore[no-any-return, no-untyped-call]
    scores = query @ key.transpose(2, 3) * scale
    scores = scores.float() if scores.element_size() < 4 else scores
    scores = scores if mask is None else scores + _narrow(mask, scores.dtype)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return drop(weights, probability, site, first_row) @ value


def drop(weights: torch.Tensor, probability: float, site: Site | None, first_row: int | None = None) -> torch.Tensor:
    """[examples, heads, queries, keys] weights of an attention, those that are kept scaled; None drops nothing."""
    if site is None:
        return weights
    return drop_elements(weights, site.draw(weights.shape, probability, weights.device, first_row), probability)


def drop_elements(values: torch.Tensor, kept: torch.Tensor, probability: float) -> torch.Tensor:
    """`values` with zeros where they are not kept, scaled by 1 / (1 - probability) elsewhere; differentiable."""
    return _Dropout.apply(values, kept, 1 / (1 - probability))  # type: ignore[no-any-return, no-untyped-call]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return _scale_kept(values, kept, scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _scale_kept(gradient, kept, ctx.scale), None, None


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _scale_kept(values: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    if _is_on_host(values):
        return keep(values.contiguous(), kept).mul_(scale)
    return torch.ops.aten.native_dropout_backward(values, kept, scale)  # type: ignore[no-any-return]  # One kernel.


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers: matrices where they are faster on a CPU, else SDPA.

    SDPA's fused kernel is faster without dropout in float32, and without gradients.

    Args:
        query, key, value: [examples, heads, length, head size]; keys and values may have fewer heads.
        attention_mask: [examples, 1, length or 1, length], 0 or very negative; None masks nothing.

    Returns:
        [examples, length, heads, head size], and no attention weights.
    """
    masks_future = attention_mask is None and (
        is_causal if is_causal is not None else getattr(module, "is_causal", True)
    )
    has_more = any(others.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    is_plain = not masks_future and not has_more and query.dtype == key.dtype == value.dtype
    gains = is_plain and torch.is_grad_enabled()
    site = open_site() if gains and dropout > 0 else None
    if not gains or (site is None and (dropout > 0 or query.dtype != torch.bfloat16)):
        mask = None if attention_mask is None else _narrow(attention_mask, query.dtype)
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    context = attend_by_example(query, key, value, attention_mask, scale, dropout, site)
    return context.transpose(1, 2).contiguous(), None


def build_attention_mask(
    *, attention_mask: torch.Tensor | None = None, kv_length: int, mask_function: Any, **others: Any
) -> torch.Tensor | None:
    """A mask function for transformers: one row an example if only padding is masked, else the mask of eager attention.

    Args:
        attention_mask: [examples, length], true for tokens; None where there is no padding.

    Returns:
        [examples, 1, length or 1, length], very negative where it masks and 0 elsewhere; None masks nothing.
    """
    if mask_function is bidirectional_mask_function and others.get("local_size") is None:
        if attention_mask is None:
            return None
        if attention_mask.ndim == 2 and attention_mask.shape[1] == kv_length:
            dtype = others.get("dtype", torch.float32)
            seen = attention_mask.bool()[:, None, None, :]
            return torch.where(seen, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
    return eager_mask(  # type: ignore[no-any-return]
        attention_mask=attention_mask, kv_length=kv_length, mask_function=mask_function, **others
    )
