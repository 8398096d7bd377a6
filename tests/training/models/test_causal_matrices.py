"""Attention by blocks of queries gives what the textbook's formula gives, and so do its gradients."""

from __future__ import annotations

import pytest
import torch

from onecurve.training import architectures
from onecurve.training.models.causal_matrices import attend_causally

SCALE = 0.3


def build_mask(length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen if window is None else seen.triu(1 - window)
    return torch.zeros(length, length, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def build_states(length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [2 examples, 3 heads, length, 4, 4 and 5], as a model lays them out."""
    torch.manual_seed(0)

    def build(size: int) -> torch.Tensor:
        return torch.randn(2, length, 3, size, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()

    return build(4), build(4), build(5)


def attend_plainly(states: tuple[torch.Tensor, ...], window: int | None) -> torch.Tensor:
    query, key, value = (each.double() for each in states)
    scores = query @ key.transpose(2, 3) * SCALE + build_mask(query.shape[2], window, torch.float64)
    return torch.softmax(scores, dim=-1) @ value


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("length", [1, 4, 5, 13])
def test_blocks_give_the_whole(length: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "QUERIES_PER_BLOCK", 4)
    states = build_states(length, torch.float64)
    found = attend_causally(*states, build_mask(length, window, torch.float64), SCALE, window)
    expected = attend_plainly(states, window)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for own, plain in zip(
        torch.autograd.grad(found, states, upstream), torch.autograd.grad(expected, states, upstream), strict=True
    ):
        # Gradients of keys and values are summed in float32.
        torch.testing.assert_close(own, plain, rtol=1e-6, atol=1e-6)


def test_many_blocks_round_hardly_more_than_one_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    states = build_states(64, torch.bfloat16)
    mask = build_mask(64, None, torch.bfloat16)
    exact = torch.autograd.grad(attend_plainly(states, None).sum(), states)
    errors = []
    for block in (64, 4):
        monkeypatch.setattr(architectures, "QUERIES_PER_BLOCK", block)
        found = torch.autograd.grad(attend_causally(*states, mask, SCALE, None).sum(), states)
        errors.append([float((own - plain).norm() / plain.norm()) for own, plain in zip(found, exact, strict=True)])
    for whole, blocks in zip(*errors, strict=True):
        assert blocks < 1.5 * whole
    assert max(errors[1]) < 0.02


def test_what_no_query_sees_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "QUERIES_PER_BLOCK", 4)
    assert architectures.list_query_blocks(10, None) == [(0, 4, 0), (4, 8, 0), (8, 10, 0)]
    assert architectures.list_query_blocks(10, 3) == [(0, 4, 0), (4, 8, 2), (8, 10, 6)]
