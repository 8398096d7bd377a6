"""Results of an evaluation, sent from all ranks to all ranks: those of several micro-batches in one message.

Every rank knows the plan, and so knows which examples a message is about, in which order, and how long each rank's message
is. So one collective and one wait for the device suffice for many micro-batches. A message is bytes::

    whether this rank was asked to stop | results of its first micro-batch, name by name | of its second | ... | padding
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from onecurve.training.data.columns import Array
from onecurve.training.data.plan import MicroBatch

Part = tuple[Array, dict[str, Array]]
"""The indices of a micro-batch's examples, and their results by name."""


@dataclass(frozen=True)
class Round:
    """The micro-batches that all ranks evaluate at the same time.

    Attributes:
        micro_batches: [ranks].
        results: what this rank found in its own: [examples, ...] by name, or [tokens, ...] where they are ragged.
    """

    micro_batches: Sequence[MicroBatch]
    results: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Result:
    """How a result lies in a message.

    Attributes:
        shape: of one example; of one token where it is ragged.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    is_ragged: bool

    def shape_of(self, micro_batch: MicroBatch, token_lengths: Array | None) -> tuple[int, ...]:
        if not self.is_ragged:
            return (len(micro_batch.indices), *self.shape)
        assert token_lengths is not None, "ragged results need the examples' tokens"
        return (int(token_lengths[micro_batch.indices].sum()), *self.shape)


def gather_results(
    accelerator: Accelerator,
    rounds: Sequence[Round],
    is_asked: bool,
    ragged: frozenset[str],
    token_lengths: Array | None,
) -> tuple[bool, list[Part]]:
    """Send the results of some rounds to all ranks. Every rank must call it, with as many rounds.

    Args:
        is_asked: whether this rank was asked to stop.
        ragged: names of the results with a value for each token.
        token_lengths: [examples] tokens of every example of the data; None if no result is ragged.

    Returns:
        Whether any rank was asked to stop; and for each micro-batch of all ranks but stand-ins, the examples' indices and
        their results by name.
    """
    results = [_describe(name, values, name in ragged) for name, values in sorted(rounds[0].results.items())]
    sizes = [_count_bytes(rounds, rank, results, token_lengths) for rank in range(accelerator.num_processes)]
    own = accelerator.process_index
    device = next(iter(rounds[0].results.values())).device
    message = torch.cat(
        [
            torch.full((1,), is_asked, dtype=torch.uint8, device=device),
            *(
                each.results[result.name].contiguous().flatten().view(torch.uint8)
                for each in rounds
                if not each.micro_batches[own].is_empty
                for result in results
            ),
            torch.zeros(max(sizes) - sizes[own], dtype=torch.uint8, device=device),
        ]
    )
    assert len(message) == 1 + max(sizes), "results have the shapes that the plan says"
    messages = accelerator.gather(message).cpu().numpy().reshape(accelerator.num_processes, -1)
    found = [part for rank, each in enumerate(messages) for part in _read(each, rounds, rank, results, token_lengths)]
    return bool(messages[:, 0].any()), found


def _describe(name: str, values: torch.Tensor, is_ragged: bool) -> _Result:
    dtype = torch.empty(0, dtype=values.dtype).numpy().dtype
    return _Result(name, dtype, tuple(values.shape[1:]), is_ragged)


def _count_bytes(rounds: Sequence[Round], rank: int, results: Sequence[_Result], token_lengths: Array | None) -> int:
    """Bytes of a rank's results."""
    return sum(
        math.prod(result.shape_of(each.micro_batches[rank], token_lengths)) * result.dtype.itemsize
        for each in rounds
        if not each.micro_batches[rank].is_empty
        for result in results
    )


def _read(
    message: Array, rounds: Sequence[Round], rank: int, results: Sequence[_Result], token_lengths: Array | None
) -> Iterator[Part]:
    """The indices and the results of each of a rank's micro-batches."""
    start = 1
    for each in rounds:
        micro_batch = each.micro_batches[rank]
        if micro_batch.is_empty:
            continue
        found = {}
        for result in results:
            shape = result.shape_of(micro_batch, token_lengths)
            found[result.name] = np.frombuffer(message, result.dtype, math.prod(shape), start).reshape(shape)
            start += found[result.name].nbytes
        yield micro_batch.indices, found
