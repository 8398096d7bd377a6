"""Which process keeps and writes which tensor of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from accelerate import Accelerator
from accelerate.utils import gather_object

from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.run_directory import RunDirectory, part_of


@dataclass
class Dealing:
    """Deals tensors, in the order in which they are gathered, each to the process that has the fewest bytes so far.

    Every process sees the same names and sizes in the same order, so all know the owner of each tensor without asking.
    None gets more than the mean and one tensor.

    Attributes:
        writers: ranks that write.
        group_of: tensors of the same group go to the same process.
        piece_bytes: what a process keeps of a file is several files of at most this size, or of one larger tensor; None for
            one.
        owners: by file name: the rank that has each tensor.
        pieces: by file name: which of its rank's pieces each tensor is in, counted from 0.
        num_bytes: by file name: of all tensors.
    """

    writers: Sequence[int]
    group_of: Callable[[str], str] = str
    piece_bytes: int | None = None
    owners: dict[str, dict[str, int]] = field(default_factory=dict)
    pieces: dict[str, dict[str, int]] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)
    _load: dict[int, int] = field(init=False)
    _owner_of_group: dict[tuple[str, str], int] = field(default_factory=dict)
    _last_piece: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load = dict.fromkeys(self.writers, 0)

    def deal(self, file: str, name: str, num_bytes: int) -> int:
        """The rank that keeps this tensor of this file."""
        group = (file, self.group_of(name))
        if group not in self._owner_of_group:
            self._owner_of_group[group] = min(self._load, key=self._load.__getitem__)
        owner = self._owner_of_group[group]
        self.owners.setdefault(file, {})[name] = owner
        self.num_bytes[file] = self.num_bytes.get(file, 0) + num_bytes
        self._load[owner] += num_bytes
        piece, filled = self._last_piece.get((file, owner), (0, 0))
        if self.piece_bytes is not None and filled and filled + num_bytes > self.piece_bytes:
            piece, filled = piece + 1, 0
        self._last_piece[file, owner] = (piece, filled + num_bytes)
        self.pieces.setdefault(file, {})[name] = piece
        return owner

    def find_part(self, rank: int) -> int | None:
        """Which part this rank writes, counted from 0; None if it does not write."""
        return self.writers.index(rank) if rank in self.writers else None

    def find_file(self, file: str, name: str) -> str:
        """The name of the file that a dealt tensor is written to."""
        part = self.writers.index(self.owners[file][name])
        return part_of(file, part, len(self.writers), self.pieces[file][name])


def find_writers(accelerator: Accelerator, run: RunDirectory) -> tuple[tuple[int, ...], str | None]:
    """The ranks that see rank 0's run directory, after it was created, and a line for the user if not all do.

    Every rank must call it.
    """
    mark = run.path / ask_main_process(lambda: _leave_mark(run))
    sees = gather_object([mark.exists()])
    if accelerator.is_main_process:
        mark.unlink()
    writers = tuple(rank for rank, can in enumerate(sees) if can)
    if len(writers) == len(sees):
        return writers, None
    return writers, (
        f"output_dir {str(run.path)!r} is not on a file system that all machines share: {len(writers)} of {len(sees)} "
        "processes see it and hold all of each checkpoint; a resume on these machines will fail"
    )


def _leave_mark(run: RunDirectory) -> str:
    mark = run.path / f".seen_{os.urandom(8).hex()}"  # A name that no machine's cache of the folder can know.
    mark.touch()
    return mark.name
