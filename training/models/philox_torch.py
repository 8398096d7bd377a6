"""The random numbers of philox.py in PyTorch's integer operations, on any device: the same bits.

A GPU draws masks with this, because NumPy's generator draws on the host. PyTorch compiles it into one kernel where its compiler
works; without one each operation is a kernel of its own, which is many times slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import torch

from onecurve.training.models.philox import Boxes, Key, fill

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_NUM_ROUNDS = 10
_LOW = 0xFFFFFFFF
_BLOCK_BYTES = 32

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def compute_words(
    blocks: torch.Tensor, examples: torch.Tensor, rows: torch.Tensor, round_keys: torch.Tensor
) -> torch.Tensor:
    """The four numbers of each block (Salmon et al. 2011, section 3.3); integers are unsigned, in the bits of int64.

    Args:
        blocks, examples, rows: [blocks] int64 counters.
        round_keys: [rounds, 2] int64.

    Returns:
        [blocks, 4] int64.
    """
    c0, c1, c2, c3 = blocks, examples, rows, torch.zeros_like(blocks)
    for number in range(_NUM_ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ round_keys[number, 0], low_1, high_0 ^ c3 ^ round_keys[number, 1], low_0
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _multiply(values: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 64 bits of the product of unsigned 64-bit integers, by halves."""
    factor_high, factor_low = factor >> 32, factor & _LOW
    low, high = values & _LOW, (values >> 32) & _LOW
    first = high * factor_low + (((low * factor_low) >> 32) & _LOW)
    second = low * factor_high + (first & _LOW)
    return high * factor_high + ((first >> 32) & _LOW) + ((second >> 32) & _LOW), values * _to_signed(factor)


def _to_signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def fill_on_device(numbers: torch.Tensor, boxes: Boxes, key: Key, compute: Compute | None = None) -> None:
    """As `philox.fill`, for a flat tensor of int8 or int16 on any device; nothing waits for the device.

    Args:
        compute: does what `compute_words` does; by default what is quickest on the device.
    """
    compute = compute or _choose(numbers.device)
    width = numbers.element_size()
    counts = boxes.num_heads * boxes.sizes.prod(axis=1)
    num_blocks = -(-counts * width // _BLOCK_BYTES)
    firsts = np.cumsum(num_blocks) - num_blocks
    total = int(num_blocks.sum())
    table = _send(np.stack([num_blocks, firsts - 1, boxes.examples, boxes.rows]), numbers.device)
    # The first block is number 1, as NumPy counts.
    before, examples, rows = torch.repeat_interleave(table[1:], table[0], dim=1, output_size=total)
    blocks = torch.arange(total, device=numbers.device) - before
    drawn = compute(blocks, examples, rows, _compute_round_keys(key, numbers.device)).view(numbers.dtype).flatten()
    _place(numbers, drawn, boxes, firsts * (_BLOCK_BYTES // width))


def _place(numbers: torch.Tensor, drawn: torch.Tensor, boxes: Boxes, firsts: Any) -> None:
    """Put the boxes, which lie one behind the other from `firsts` on, where they belong; equal ones together."""
    table = [(*place, first) for place, first in zip(boxes.places, firsts.tolist(), strict=True)]
    for (queries, keys), run in groupby(table, key=lambda each: each[:2]):
        places = list(run)
        count, size = len(places), boxes.num_heads * queries * keys
        start, first = places[0][2:]
        stride = places[1][3] - first if count > 1 else size
        num_queries, num_keys = boxes.shape or (queries, keys)
        step = places[1][2] - start if count > 1 else boxes.num_heads * num_queries * num_keys
        inside = min(queries, num_queries), min(keys, num_keys)
        shape = (count, boxes.num_heads, *inside)
        source = drawn.as_strided(shape, (stride, queries * keys, keys, 1), first)
        numbers.as_strided(shape, (step, num_queries * num_keys, num_keys, 1), start).copy_(source)


def _compute_round_keys(key: Key, device: torch.device) -> torch.Tensor:
    keys = [[_to_signed((part + number * weyl) % 2**64) for part, weyl in zip(key, _WEYL, strict=True)]
            for number in range(_NUM_ROUNDS)]  # fmt: skip
    return _send(np.array(keys, dtype=np.int64), device)


def _send(values: Any, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@functools.cache
def _choose(device: torch.device) -> Compute:
    """Compiled on a GPU, if that gives the bits of the host."""
    if device.type != "cuda":
        return compute_words
    boxes = Boxes(np.array([3, 2**40]), np.array([0, 1]), np.array([[1, 1000], [1, 77]]), np.array([0, 1000]))
    expected, found = np.zeros(1077, np.int8), torch.zeros(1077, dtype=torch.int8, device=device)
    fill(expected, boxes, (2**63 + 1, 5))
    try:
        compiled: Compute = torch.compile(compute_words, dynamic=True)
        fill_on_device(found, boxes, (2**63 + 1, 5), compiled)
    except Exception:  # A compiler that is not there, or does not know the device, raises anything.
        return compute_words
    return compiled if found.cpu().numpy().tobytes() == expected.tobytes() else compute_words
