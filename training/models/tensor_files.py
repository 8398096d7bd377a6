"""Tensors by name in one safetensors file, or in several beside an index, as transformers names and reads them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from onecurve.training.run_directory import index_of


class TensorFiles:
    """Reads tensors, or parts of them. Files are opened when they are needed and mapped into memory, not copied."""

    def __init__(self, path: Path) -> None:
        """Read which tensors there are.

        Args:
            path: the one file; where it does not exist, `index_of` its name lies beside it.
        """
        self._path = path
        self._opened = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        if path.is_file():
            self._file_of = dict.fromkeys(self._open(path.name).keys(), path.name)
        else:
            index = json.loads((path.parent / index_of(path.name)).read_text(encoding="utf-8"))
            self._file_of = dict(index["weight_map"])

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        tensor: torch.Tensor = self._open(self._file_of[name]).get_tensor(name)
        return tensor

    def read_part(self, name: str, begin: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The part of a tensor that begins at these indices and has this shape."""
        if not begin or 0 in size:  # safetensors has no slices of a number, and none that begins at the end.
            return self.read(name).new_empty(size) if begin else self.read(name)
        region = tuple(slice(first, first + count) for first, count in zip(begin, size, strict=True))
        part: torch.Tensor = self._slice(name)[region]
        return part

    def read_flat(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Numbers `begin` to `end` of a tensor as it lies in memory: [end - begin], fewer where the tensor ends before.

        Only rows that hold some of them are read.
        """
        shape = self.shape(name)
        end = min(end, math.prod(shape))
        if begin >= end:
            return self.read(name).flatten()[:0]
        if not shape:
            return self.read(name).flatten()
        row = math.prod(shape[1:])
        first = begin // row
        rows: torch.Tensor = self._slice(name)[first : -(-end // row)]
        return rows.flatten()[begin - first * row : end - first * row]

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.clear()
        self._opened.close()

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = self._opened.enter_context(safe_open(self._path.parent / name, "pt"))
        return self._files[name]

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(name)


def write_index(path: Path, file_of: Mapping[str, str], num_bytes: int) -> None:
    """Write the index beside `path`'s files.

    Args:
        file_of: the file that holds each tensor.
        num_bytes: of all tensors.
    """
    content = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(file_of.items()))}
    (path.parent / index_of(path.name)).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
