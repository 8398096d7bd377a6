"""Packed sequences become rows and sequences again; rows are padded only where that costs less than a call."""

from __future__ import annotations

import pytest
import torch

from onecurve.training.models.sequence_rows import group_by_length, to_rows, to_sequences


@pytest.mark.parametrize("lengths", [(3, 3, 3), (1, 2, 5), (5, 2, 1), (4,)])
def test_there_and_back(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sequences = torch.randn(sum(lengths), 2, 3, requires_grad=True)
    rows = to_rows(sequences, lengths)
    assert rows.shape == (len(lengths), max(lengths), 2, 3)
    for row, sequence, length in zip(rows, torch.split(sequences, list(lengths)), lengths, strict=True):
        assert torch.equal(row[:length], sequence)
        assert not row[length:].any()
    again = to_sequences(rows * 2, lengths)
    assert torch.equal(again, 2 * sequences)
    (gradient,) = torch.autograd.grad(again, sequences, factor := torch.randn_like(sequences))
    assert torch.equal(gradient, 2 * factor)


def test_like_lengths_are_computed_together() -> None:
    assert group_by_length((30, 31, 40, 50, 60)) == [(30, 31, 40, 50, 60)]
    assert group_by_length((1000, 1000, 1000)) == [(1000, 1000, 1000)]
    assert group_by_length((100, 1000, 1001)) == [(100,), (1000, 1001)]
    assert group_by_length((1000, 100)) == [(1000,), (100,)]
    assert group_by_length(()) == []


@pytest.mark.parametrize("lengths", [tuple(range(1, 200, 3)), tuple(range(500, 1000, 7)), (3, 900, 5, 900, 4)])
def test_padding_never_costs_more_than_the_calls_it_saves(lengths: tuple[int, ...]) -> None:
    groups = group_by_length(lengths)
    assert sum(groups, ()) == lengths
    for group in groups:
        padding = len(group) * max(group) ** 2 - sum(length**2 for length in group)
        assert padding <= 64 * 64 * (len(group) - 1)
