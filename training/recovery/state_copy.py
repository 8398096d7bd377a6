"""The state of a training in host memory, each tensor kept by one process."""

from __future__ import annotations

from dataclasses import dataclass, field

from onecurve.training.parallel.gathering import Divided, Transfers
from onecurve.training.parallel.states import States, Tensors
from onecurve.training.recovery.dealing import Dealing
from onecurve.training.recovery.host_copy import HostCopy
from onecurve.training.recovery.piece_writer import PieceWriter


@dataclass
class StateCopy:
    """What this rank keeps, and which rank keeps what.

    Attributes:
        rank: this process's.
        dealing: of the last copy; a new one begins the next.
    """

    rank: int
    dealing: Dealing = field(default_factory=lambda: Dealing((0,)))
    _copies: dict[str, HostCopy] = field(default_factory=dict)

    def take(self, file: str, states: States, pieces: PieceWriter | None = None) -> None:
        """Copy each tensor that is dealt to this rank, and send the others what they need of it. Every rank must call it.

        Args:
            file: that the tensors belong to.
            pieces: takes each piece when it is complete, but for the last one; None keeps all in memory.
        """
        copy = self._copies.setdefault(file, HostCopy())
        transfers, kept, piece = Transfers(), list[str](), 0
        for name, tensor in states:
            keeper = self.dealing.deal(file, name, tensor.nbytes)
            if keeper == self.rank:
                if pieces is not None and self.dealing.pieces[file][name] > piece:
                    transfers.finish()
                    pieces.write(self.dealing.find_file(file, kept[0]), {each: copy.tensors.pop(each) for each in kept})
                    kept, piece = [], piece + 1
                copy.store(name, tensor, transfers)
                kept.append(name)
            elif isinstance(tensor, Divided):
                transfers.send(tensor, keeper)
        transfers.finish()
        copy.keep_only(kept)

    def tensors(self, file: str) -> Tensors:
        """What this rank keeps in memory."""
        return self._copies[file].tensors

    def group_by_file(self) -> dict[str, Tensors]:
        """The same, by the name that each file gets. If one process writes alone, it has each file even if it is empty."""
        files: dict[str, Tensors] = {}
        for file, copy in self._copies.items():
            if len(self.dealing.writers) == 1:
                files[file] = {}
            for name, tensor in copy.tensors.items():
                files.setdefault(self.dealing.find_file(file, name), {})[name] = tensor
        return files

    def clear(self) -> None:
        """Free all memory."""
        for copy in self._copies.values():
            copy.tensors.clear()
