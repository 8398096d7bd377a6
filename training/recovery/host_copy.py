"""A copy of the training's state in host memory, which stays allocated from one checkpoint to the next.

A GPU copies several times faster into pinned memory than into pageable memory. But torch allocates pinned memory in powers
of two, for each tensor, and never gives it back. So tensors pass through one small pinned buffer into pageable memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from onecurve.training.parallel.gathering import Divided, Transfers
from onecurve.training.parallel.states import Tensors

_BUFFER_BYTES = 64 * 2**20


@dataclass
class HostCopy:
    """Tensors by name. A tensor that is stored again reuses its memory."""

    tensors: Tensors = field(default_factory=dict)
    _buffer: torch.Tensor | None = None

    def store(self, name: str, tensor: torch.Tensor | Divided, transfers: Transfers) -> None:
        """Copy a tensor from any device.

        Args:
            transfers: takes what other processes hold of it: the copy is complete when they are finished.
        """
        if name not in self.tensors:
            self.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        if isinstance(tensor, Divided):
            if tensor.own.device.type == "cpu":
                transfers.receive(tensor, self.tensors[name])
                return
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.own.device)
            transfers.receive(tensor, whole)
            transfers.finish()
            tensor = whole
        if not tensor.is_cuda:
            self.tensors[name].copy_(tensor)
            return
        if self._buffer is None:
            self._buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        copy_in_pieces(tensor, self.tensors[name], self._buffer)

    def keep_only(self, names: Collection[str]) -> None:
        """Free what is not of these names."""
        for name in self.tensors.keys() - set(names):
            del self.tensors[name]

    def count_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def copy_in_pieces(source: torch.Tensor, target: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copy `source` to `target` through `buffer`.

    Args:
        source: any shape and type.
        target: the same shape and type, contiguous.
        buffer: [bytes] uint8.
    """
    content, place = source.contiguous().flatten().view(torch.uint8), target.flatten().view(torch.uint8)
    for begin in range(0, len(content), len(buffer)):
        piece = content[begin : begin + len(buffer)]
        buffer[: len(piece)].copy_(piece)
        place[begin : begin + len(piece)].copy_(buffer[: len(piece)])
