"""Tensors that are divided among processes, gathered by the one process that keeps them.

The others send their part and receive nothing, so each number travels once, into its place, and only a tensor's keeper needs
memory for the whole of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import prod

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard

_MOST_UNDER_WAY = 8
"""Tensors on their way at once: enough that no process waits for another between two of them."""


@dataclass(frozen=True)
class Divided:
    """A tensor of which each process of a group holds a run of its numbers, in the order of their ranks.

    Attributes:
        own: [numbers] this process's run on any device, contiguous; what is behind the tensor's end is padding.
        shape: of the whole tensor.
        share: numbers of each run; the last ones have fewer, or none.
        group: its processes; with replicas, those of this process's replica.
    """

    own: torch.Tensor
    shape: torch.Size
    share: int
    group: distributed.ProcessGroup

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.own.dtype

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def find_run(self, rank: int) -> slice:
        """The numbers that a process holds.

        Args:
            rank: in the group.
        """
        size = prod(self.shape)
        return slice(min(rank * self.share, size), min((rank + 1) * self.share, size))


def divide(tensor: DTensor) -> Divided | None:
    """How a DTensor is divided; None if its rows are not divided among processes, one run of them each."""
    sharded = [number for number, placement in enumerate(tensor.placements) if placement == Shard(0)]
    rest = [placement for placement in tensor.placements if not isinstance(placement, Replicate)]
    if len(sharded) != 1 or len(rest) != 1:
        return None
    group = tensor.device_mesh.get_group(sharded[0])
    rows = -(-tensor.shape[0] // group.size())
    return Divided(tensor.to_local().contiguous().flatten(), tensor.shape, rows * prod(tensor.shape[1:]), group)


@dataclass
class Transfers:
    """What is on its way between processes. All processes of a group take the same tensors in the same order."""

    _under_way: deque[list[distributed.Work]] = field(default_factory=deque)

    def send(self, tensor: Divided, keeper: int) -> None:
        """Send the own part to the process of that global rank, if it is of the group: else a replica does it.

        The part may not change until `finish` has returned.
        """
        if keeper in distributed.get_process_group_ranks(tensor.group):
            own = tensor.own[: _size(tensor.find_run(tensor.group.rank()))]
            self._start([distributed.P2POp(distributed.isend, own, keeper, tensor.group)] if len(own) else [])

    def receive(self, tensor: Divided, whole: torch.Tensor) -> None:
        """Receive all parts.

        Args:
            whole: of the tensor's shape and type, on its device, contiguous; complete when `finish` has returned.
        """
        numbers, operations = whole.view(-1), []
        for rank, sender in enumerate(distributed.get_process_group_ranks(tensor.group)):
            run = tensor.find_run(rank)
            if rank == tensor.group.rank():
                numbers[run].copy_(tensor.own[: _size(run)])
            elif _size(run):
                operations.append(distributed.P2POp(distributed.irecv, numbers[run], sender, tensor.group))
        self._start(operations)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        while self._under_way:
            self._wait()

    def _start(self, operations: list[distributed.P2POp]) -> None:
        if operations:
            self._under_way.append(distributed.batch_isend_irecv(operations))
        if len(self._under_way) > _MOST_UNDER_WAY:
            self._wait()

    def _wait(self) -> None:
        for work in self._under_way.popleft():
            work.wait()


def _size(run: slice) -> int:
    return int(run.stop - run.start)
