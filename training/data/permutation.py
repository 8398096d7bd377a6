"""A shuffle without a table: any part of the order of a billion examples is computed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_NUM_ROUNDS = 8  # Enough for every position of a small domain to be equally likely (tests/training/data/test_plan.py).


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*numbers: int) -> int:
    """One 64-bit key from several integers, such as (seed, epoch); different tuples give unrelated keys."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix(key + np.uint64(number % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return int(key[0])


def permute(positions: NDArray[Any], num_examples: int, key: int) -> Indices:
    """Where each position lands under the permutation of range(num_examples) that `key` names.

    A Feistel network over the next power of two with cycle walking (Black and Rogaway 2002): a bijection that needs no
    table, so any part of a billion-example order costs only that part.

    Args:
        positions: integers in range(num_examples), any shape.
    """
    num_bits = max(2, (num_examples - 1).bit_length())
    round_keys = [np.uint64(derive_key(key, number)) for number in range(_NUM_ROUNDS)]
    result = _encrypt(np.asarray(positions, dtype=np.uint64), num_bits, round_keys)
    outside = np.flatnonzero(result >= num_examples)
    while outside.size:  # Fewer than half are outside the range on average, so this halves.
        result[outside] = _encrypt(result[outside], num_bits, round_keys)
        outside = outside[result[outside] >= num_examples]
    return result.astype(np.int64)


def _encrypt(values: NDArray[np.uint64], num_bits: int, round_keys: Sequence[np.uint64]) -> NDArray[np.uint64]:
    high_bits, low_bits = num_bits // 2, num_bits - num_bits // 2
    for round_key in round_keys:  # An even number of rounds, so that unequal halves come back in their places.
        high, low = values >> np.uint64(low_bits), values & np.uint64((1 << low_bits) - 1)
        high = high ^ (mix(low ^ round_key) & np.uint64((1 << high_bits) - 1))
        values = (low << np.uint64(high_bits)) | high
        high_bits, low_bits = low_bits, high_bits
    return values
