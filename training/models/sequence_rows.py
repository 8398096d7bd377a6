"""Packed sequences as rows and back: where no kernel takes sequences of different lengths at once.

A call of an attention costs time however little it computes, and so does padding, so rows are padded only where that is less.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

# A call costs about as much as the scores of this many pairs of tokens: measured on a CPU with 9 heads of 64.
_PAIRS_PER_CALL = 64 * 64


@lru_cache(maxsize=8)  # All layers of a forward ask the same.
def group_by_length(lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Divide sequences, which stay in their order, into groups that are computed together, as rows of the longest.

    Args:
        lengths: tokens of each sequence. Those of a micro-batch are sorted, so like ones stand beside each other.
    """
    groups: list[list[int]] = []
    for length in lengths:
        if groups and _costs_less_than_a_call([*groups[-1], length]):
            groups[-1].append(length)
        else:
            groups.append([length])
    return [tuple(group) for group in groups]


def _costs_less_than_a_call(lengths: list[int]) -> bool:
    """Whether padding these computes less than the calls that it saves."""
    computed = len(lengths) * max(lengths) ** 2
    return computed - sum(length**2 for length in lengths) <= (len(lengths) - 1) * _PAIRS_PER_CALL


def to_rows(sequences: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """[tokens, ...] of packed sequences as [sequences, longest, ...], padded with zeros on the right."""
    if min(lengths) == max(lengths):
        return sequences.view(len(lengths), lengths[0], *sequences.shape[1:])
    return _Rows.apply(sequences, lengths)  # type: ignore[no-any-return, no-untyped-call]


def to_sequences(rows: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `to_rows`."""
    if min(lengths) == max(lengths):
        return rows.flatten(0, 1)
    return _Sequences.apply(rows, lengths)  # type: ignore[no-any-return, no-untyped-call]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sequences: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        ctx.lengths = lengths
        return _pad(sequences, lengths)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _unpad(gradient, ctx.lengths), None


class _Sequences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        ctx.lengths = lengths
        return _unpad(rows, lengths)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _pad(gradient, ctx.lengths), None


def _pad(sequences: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    rows = sequences.new_zeros(len(lengths), max(lengths), *sequences.shape[1:])
    for row, sequence in zip(rows, torch.split(sequences, list(lengths)), strict=True):
        row[: len(sequence)] = sequence
    return rows


def _unpad(rows: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
