"""Features of prepared examples on disk: written batch by batch, read memory-mapped, so that no process holds them all.

A dense feature is one file of numbers [examples, ...]; a ragged one is a file of all its values and one of where each
example ends. Processes of one machine share the pages of both.
"""

from __future__ import annotations

import itertools
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Dense:
    """A feature of one shape for all examples.

    Attributes:
        values: [examples, ...].
    """

    values: Array

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, indices: Any) -> Array:
        """[indices, ...] values of some examples."""
        return np.asarray(self.values[indices])

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What a digest of the feature covers."""
        return (self.values,)


@dataclass(frozen=True)
class Ragged:
    """A feature of another length in each example.

    Attributes:
        values: [sum of lengths] of all examples, one behind the other.
        ends: [examples] where each example ends in `values`.
    """

    values: Array
    ends: Array

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, indices: Any) -> list[Array]:
        """Values of some examples."""
        wanted = np.arange(len(self))[indices]
        starts = np.where(wanted > 0, self.ends[wanted - 1], 0)
        return [self.values[start:stop] for start, stop in zip(starts, self.ends[wanted], strict=True)]

    @property
    def lengths(self) -> Array:
        """[examples] values of each example, int32."""
        return np.diff(self.ends, prepend=0).astype(np.int32)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What a digest of the feature covers."""
        return (self.values, self.ends)


Feature = Dense | Ragged
Examples = Mapping[str, Feature]


class ExamplesWriter:
    """Writes the features of a split into a folder, a batch at a time; used as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._meta: dict[str, dict[str, Any]] = {}
        self._ends: dict[str, int] = {}
        self.num_examples = 0

    def __enter__(self) -> ExamplesWriter:
        self._folder.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
        (self._folder / "features.json").write_text(json.dumps(self._meta), encoding="utf-8")

    def write(self, batch: Mapping[str, Any]) -> None:
        """Append examples.

        Args:
            batch: for each feature an array [examples, ...], or a list of sequences of numbers or of bytes; the same
                features, kinds and types in each batch.
        """
        sizes = {name: len(values) for name, values in batch.items()}
        assert len(set(sizes.values())) == 1, f"features of {sizes} examples"
        for name, values in batch.items():
            if isinstance(values, np.ndarray):
                self._append(name, "dense", values, list(values.shape[1:]))
            else:
                self._append_ragged(name, values)
        self.num_examples += next(iter(sizes.values()))

    def _append_ragged(self, name: str, rows: Sequence[Sequence[float] | bytes]) -> None:
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        self._append(name, "ragged", _join(name, rows), [])
        ends = np.cumsum(lengths) + self._ends.get(name, 0)
        self._ends[name] = int(ends[-1]) if len(ends) else self._ends.get(name, 0)
        self._write(f"{name}.ends", ends)

    def _append(self, name: str, kind: str, values: Array, shape: list[int]) -> None:
        meta = {"kind": kind, "dtype": values.dtype.str, "shape": shape}
        if name in self._meta and not (kind == "ragged" and not len(values)):
            assert self._meta[name] == meta, f"{name}: {meta} after {self._meta[name]}"
        self._meta.setdefault(name, meta)
        self._write(name, values)

    def _write(self, name: str, values: Array) -> None:
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.bin").open("wb")
        np.ascontiguousarray(values).tofile(self._files[name])


def _join(name: str, rows: Sequence[Sequence[float] | bytes]) -> Array:
    """The values of all rows, one behind the other: uint8 of bytes, float32 where one is a decimal, else int32."""
    if rows and isinstance(rows[0], bytes):
        return np.frombuffer(b"".join(row for row in rows if isinstance(row, bytes)), np.uint8)
    # Of all values, not of the first: 0.5 behind a 1 would become 0.
    flat = np.array(list(itertools.chain.from_iterable(rows)))
    if flat.dtype.kind == "f" and len(flat):
        return flat.astype(np.float32)
    assert not len(flat) or np.abs(flat).max() < 2**31, f"{name}: numbers of more than 32 bits"
    return flat.astype(np.int32)


def open_examples(folder: Path) -> Examples:
    """The features that an `ExamplesWriter` has written, memory-mapped."""
    meta = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    examples: dict[str, Feature] = {}
    for name, entry in meta.items():
        values = _map(folder / f"{name}.bin", entry["dtype"])
        if entry["kind"] == "dense":
            examples[name] = Dense(values.reshape(-1, *entry["shape"]))
        else:
            examples[name] = Ragged(values, _map(folder / f"{name}.ends.bin", "<i8"))
    return examples


def release(array: Array) -> None:
    """Let go of what was read of a mapped file: its pages count as this process's memory until the system wants them back.

    Who reads it again gets it from the system's cache of files.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # Windows has none.
        owner.madvise(mmap.MADV_DONTNEED)


def _map(path: Path, dtype: str) -> Array:
    if not path.stat().st_size:  # An empty file can't be mapped.
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
