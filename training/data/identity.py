"""Who the examples of a step are: 64-bit digests of their contents, and of a global batch, by which two runs are compared.

The identity of an example is found once, at preparation, and kept beside it (identities.npy). The digest of a step is
computed by each process from the plan alone: the number of processes is not among its arguments. These digests find
differences that nobody intends; they are no protection against someone who looks for a collision.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from onecurve.training.data.columns import Array, Examples, Feature, Ragged, release
from onecurve.training.data.permutation import Indices, mix

Identities = NDArray[np.uint64]

# About so many numbers are looked at at once, which takes some 100 MB.
_VALUES_AT_ONCE = 1 << 20

_POSITION = np.uint64(0x9E3779B97F4A7C15)  # Odd: another number for each position.

# Where an example stood in its file: the same example in another place has the same content.
_PLACES = frozenset({"row"})


def identify_examples(examples: Examples, num_examples: int) -> Identities:
    """[num_examples] a digest of what is learned from each example: its features, without its place in the file."""
    identities = np.zeros(num_examples, dtype=np.uint64)
    num_values = sum(feature.values.size for feature in examples.values())
    num_at_once = max(1, _VALUES_AT_ONCE * num_examples // max(num_values, 1))
    for start in range(0, num_examples, num_at_once):
        stop = min(start + num_at_once, num_examples)
        for name, feature in sorted(examples.items()):
            if name not in _PLACES:
                name_key = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
                of_feature = _digest_rows(feature, start, stop)
                identities[start:stop] = mix(identities[start:stop] + mix(of_feature ^ name_key))
            for array in feature.arrays:
                release(array)
    return identities


def _digest_rows(feature: Feature, start: int, stop: int) -> Identities:
    """[stop - start] digests of the values of a feature in each example: sums of numbers that mix value and position."""
    if isinstance(feature, Ragged):
        first = int(feature.ends[start - 1]) if start else 0
        values = feature.values[first : int(feature.ends[stop - 1])]
        lengths = np.diff(feature.ends[start:stop], prepend=first)
    else:
        values = feature.values[start:stop].reshape(-1)
        lengths = np.full(stop - start, len(values) // (stop - start))
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(values)) - np.repeat(starts, lengths)
    mixed = mix(_to_bits(values) + positions.astype(np.uint64) * _POSITION)
    # Sums between ends, because an example may have no value: reduceat would give it that of the next one.
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    found: Identities = sums[starts + lengths] - sums[starts] + mix(lengths.astype(np.uint64))
    return found


def _to_bits(values: Array) -> Identities:
    """The bits of numbers of any type as uint64."""
    values = np.ascontiguousarray(values)
    return values.view(f"u{values.dtype.itemsize}").astype(np.uint64)


def digest_step(examples: Indices, identities: Array | None) -> str:
    """16 hex digits of a global batch: the same for the same examples, by number and content, in whatever order.

    The number counts because dropout masks are a function of it.

    Args:
        examples: numbers of the examples of the step.
        identities: [all examples] as `identify_examples` returns them; None digests the numbers alone.
    """
    mixed = mix(examples.astype(np.uint64) + np.uint64(1))
    if identities is not None:
        mixed = mix(mixed ^ identities[examples])
    return f"{int(mixed.sum(dtype=np.uint64)):016x}"


def digest_contents(identities: Identities) -> str:
    """16 hex digits of the contents of a split, in whatever order."""
    return f"{int(mix(np.asarray(identities)).sum(dtype=np.uint64)):016x}"
