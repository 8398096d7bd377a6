"""Faster dropout and attention on a CPU, where PyTorch's own dropout takes half of a step.

`bernoulli_` draws one slow random number for each element, and SDPA with dropout falls back to a path that draws a mask of
examples x heads x length^2 of them. Here one 64-bit random number decides for eight elements, and a bitwise "and" applies
the mask. Only the computation of modules is replaced, never a parameter: the saved model is a plain transformers model.

The random bytes come from torch's default generator, which `begin_micro_batch` seeds with (seed, step, rank): a resumed
step and a recomputed layer (gradient checkpointing) draw the same mask. Compared with torch: same drop rate, different
masks. The recipe's `dropout_masks: torch` uses torch's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onecurve.training.config import Recipe

ATTENTION = "onecurve_cpu"
"""The name under which transformers finds the attention below."""

# Each decision takes one byte, which is too coarse for smaller probabilities.
_MIN_PROBABILITY = 1 / 64

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def install(model: torch.nn.Module, recipe: Recipe) -> bool:
    """Replace the dropout of a model that trains on a CPU, and its attention unless the recipe names one.

    Not replaced: the dropout of a model with a probability too small for bytes; attention that does not use transformers'
    common interface; dropout that a model calls as a function. With torch.compile, nothing is replaced.

    Returns:
        Whether anything was replaced.
    """
    if recipe.dropout_masks != "bytes" or recipe.torch_compile:
        return False
    found = [module for module in model.modules() if type(module) is torch.nn.Dropout and module.p > 0]
    if not all(_MIN_PROBABILITY <= module.p < 1 for module in found):
        return False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in found:
                setattr(parent, name, ByteDropout(child.p))
    can_replace = getattr(model, "_supports_sdpa", False) and model._can_set_attn_implementation()  # type: ignore[operator]
    gains = bool(found) or recipe.mixed_precision == "bf16"
    uses_attention = recipe.attn_implementation is None and can_replace and gains
    if uses_attention:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, build_attention_mask)
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    return bool(found) or uses_attention


def draw_kept(num_elements: int, probability: float) -> torch.Tensor:
    """Draw which elements dropout keeps.

    Args:
        probability: that an element is dropped, between 1/64 and 1.

    Returns:
        [num_elements] int16: all bits are set for an element that is kept, none for one that is dropped.
    """
    # An element is kept if its byte is below `threshold`. The threshold is one of the two integers around its exact value,
    # drawn at random so that each element is dropped with exactly this probability.
    exact = (1 - probability) * 256
    threshold = math.floor(exact) + int(torch.rand(()).item() < exact % 1)
    limit = threshold * 256 - 32768  # The same for the upper byte of a signed 16-bit number.
    num_words = -(-num_elements // 8)
    words = torch.empty(num_words, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = torch.empty(2, len(words), dtype=torch.int16)
    # clamp gives limit - 1 below the limit and limit elsewhere; minus the limit, that is -1 (all bits) and 0 (none).
    torch.clamp(words, limit - 1, limit, out=kept[0])
    torch.clamp(words.bitwise_left_shift_(8), limit - 1, limit, out=kept[1])
    return kept.sub_(limit).flatten()[:num_elements]


def keep(values: torch.Tensor, kept: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`values`, with zeros for the elements that are dropped.

    Args:
        values: any shape, contiguous, of 2, 4 or 8 bytes a number.
        kept: from `draw_kept`.
    """
    integers = _INTEGERS[values.element_size()]
    target = torch.empty_like(values) if out is None else out
    torch.bitwise_and(values.view(integers), kept.view(values.shape).to(integers), out=target.view(integers))
    return target


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, probability: float) -> torch.Tensor:
        kept = draw_kept(values.numel(), probability)
        ctx.save_for_backward(kept)
        ctx.scale = 1 / (1 - probability)
        return keep(values.contiguous(), kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return keep(gradient.contiguous(), kept).mul_(ctx.scale), None


class ByteDropout(torch.nn.Dropout):
    """torch.nn.Dropout with masks of random bytes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """In training, `input` with some elements dropped and the others scaled; else `input`."""
        if not self.training or self.p == 0:
            return input
        return _Dropout.apply(input, self.p)  # type: ignore[no-any-return, no-untyped-call]


# Attention -----------------------------------------------------------------------------------------------------------


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
    ) -> torch.Tensor:
        shape = queries.shape
        ctx.scale, ctx.dropout_scale = scale, 1 / (1 - probability)
        queries = _lay_out(queries, scale)
        keys, values = _lay_out(keys), _lay_out(values, ctx.dropout_scale if probability else None)
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if mask is not None:
            _add_mask(scores.view(*shape[:3], -1), mask)
        weights = _softmax(scores)
        kept, dropped = None, weights
        if probability:
            kept = draw_kept(weights.numel(), probability).view(weights.shape)
            dropped = keep(weights, kept)
        ctx.save_for_backward(queries, keys, values, weights, kept, dropped)
        return torch.bmm(dropped, values).view(*shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, weights, kept, dropped = ctx.saved_tensors
        outer = gradient.shape[:2]  # Examples and heads.
        gradient = _lay_out(gradient)
        of_values = torch.bmm(dropped.transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, values.transpose(1, 2))
        if kept is not None:
            of_values.mul_(ctx.dropout_scale)
            keep(of_weights, kept, out=of_weights)
        of_scores = _softmax_backward(of_weights, weights)
        of_queries = torch.bmm(of_scores, keys).mul_(ctx.scale)
        of_keys = torch.bmm(of_scores.transpose(1, 2), queries)
        return (
            *(tensor.view(*outer, *tensor.shape[1:]) for tensor in (of_queries, of_keys, of_values)),
            None,
            None,
            None,
        )


def _is_narrow(weights: torch.Tensor) -> bool:
    """Whether a row is shorter than one vector register of bfloat16: torch's bfloat16 softmax is then not vectorized."""
    return weights.dtype == torch.bfloat16 and weights.shape[-1] < 32


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    if _is_narrow(scores):
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    return torch.softmax(scores, dim=-1)


def _softmax_backward(gradient: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if _is_narrow(weights):
        of_scores = torch.ops.aten._softmax_backward_data(gradient.float(), weights.float(), -1, torch.float32)
        return of_scores.to(weights.dtype)  # type: ignore[no-any-return]
    return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)  # type: ignore[no-any-return]


def _lay_out(tensor: torch.Tensor, factor: float | None = None) -> torch.Tensor:
    """[examples, heads, length, size] as a contiguous [examples x heads, length, size], times a factor, in one pass."""
    if factor is None:
        return tensor.contiguous().flatten(0, 1)
    return torch.mul(tensor, factor, out=torch.empty(tensor.shape, dtype=tensor.dtype)).flatten(0, 1)


def _add_mask(scores: torch.Tensor, mask: torch.Tensor) -> None:
    """Add a mask [examples, 1, queries or 1, keys] to scores [examples, heads, queries, keys], in place."""
    num_examples, num_keys = scores.shape[0], scores.shape[-1]
    if mask.shape[2] == 1 and num_keys > num_examples:  # Padding of a few long texts: write only the padded columns.
        for example, hidden in enumerate(mask[:, 0, 0] < 0):
            columns = hidden.nonzero().flatten()
            if len(columns):
                scores[example].index_fill_(-1, columns, torch.finfo(scores.dtype).min)
        return
    scores.add_(_narrow(mask, scores.dtype))


def _narrow(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a mask. In bfloat16, float32's lowest number is -inf, and a row of -inf gives NaN, so it is clamped."""
    return mask.clamp(min=torch.finfo(dtype).min).to(dtype)


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
    """An attention function for transformers: ours where it is faster, else SDPA.

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
    gains = (dropout >= _MIN_PROBABILITY) or (dropout == 0 and query.dtype == torch.bfloat16)
    if not (is_plain and gains and torch.is_grad_enabled()):
        mask = None if attention_mask is None else _narrow(attention_mask, query.dtype)
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    num_groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    context = _Attention.apply(query, key, value, attention_mask, scale, dropout)  # type: ignore[no-untyped-call]
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
