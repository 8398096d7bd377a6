"""Causal attention as matrix products over blocks of queries, each with the keys that it sees: for bf16 on a CPU.

The half of the scores that a mask would hide is never computed, and a block's weights stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch

from onecurve.training.architectures import list_query_blocks
from onecurve.training.models.matrix_attention import lay_out, softmax, softmax_backward


def attend_causally(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """softmax(query key^T scale + mask) value over the keys that each query sees; [examples, heads, length, head size].

    Args:
        query, key, value: [examples, heads, length, head size], of one type; values may have another head size.
        mask: [length, length] of that type, 0 for what is seen and else the lowest number.
        window: most tokens that one sees, itself included; None for all before it.
    """
    return _CausalAttention.apply(query, key, value, mask, scale, window)  # type: ignore[no-any-return, no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        ctx.scale, ctx.window = scale, window
        outer, length = queries.shape[:2], queries.shape[2]
        queries, keys, values = lay_out(queries, scale), lay_out(keys), lay_out(values)
        context, kept = queries.new_empty(*queries.shape[:2], values.shape[2]), []
        for begin, end, first in list_query_blocks(length, window):
            scores = torch.bmm(queries[:, begin:end], keys[:, first:end].transpose(1, 2))
            hides_from = begin if window is None else first
            scores[..., hides_from - first :].add_(mask[begin:end, hides_from:end])
            weights = softmax(scores)
            context[:, begin:end] = torch.bmm(weights, values[:, first:end])
            kept.append(weights)
        ctx.save_for_backward(queries, keys, values, *kept)
        return context.view(*outer, *context.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        outer = gradient.shape[:2]  # Examples and heads.
        gradient = lay_out(gradient)
        blocks = list_query_blocks(queries.shape[1], ctx.window)
        of_queries = torch.empty_like(queries)
        # Sums over blocks: in the type of the numbers each addition would be rounded.
        dtype = torch.float32 if len(blocks) > 1 else queries.dtype
        of_keys, of_values = (torch.zeros(each.shape, dtype=dtype) for each in (keys, values))
        for weights, (begin, end, first) in zip(kept, blocks, strict=True):
            own = gradient[:, begin:end]
            of_values[:, first:end] += torch.bmm(weights.transpose(1, 2), own)
            of_scores = softmax_backward(torch.bmm(own, values[:, first:end].transpose(1, 2)), weights)
            of_queries[:, begin:end] = torch.bmm(of_scores, keys[:, first:end]).mul_(ctx.scale)
            of_keys[:, first:end] += torch.bmm(of_scores.transpose(1, 2), queries[:, begin:end])
        gradients = (of_queries, of_keys.to(keys.dtype), of_values.to(values.dtype))
        return (*(each.view(*outer, *each.shape[1:]) for each in gradients), None, None, None)
