"""Dropout masks by example: a function of (seed, step, example, site, place in the example), and of nothing else.

The process, the micro-batch, padding and packing do not enter, so the curve is the same on every topology with the model's own
dropout on. A site is a dropout of the model, by its number in the forward; recomputed layers (gradient checkpointing) get the
numbers that they had. `begin` says which examples the next forward computes; example_dropout.py asks for their masks.

An element is kept if its random byte is below (1 - p) x 256. That number is one of the two integers around it, drawn for each
site and step so that elements are dropped with exactly this probability. Very small and very large p take two bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from onecurve.training.data.permutation import derive_key
from onecurve.training.data.plan import Placement
from onecurve.training.models import philox
from onecurve.training.models.philox import Boxes
from onecurve.training.models.philox_torch import fill_on_device

# A mask that belongs to no example, such as one over a model's relative positions, is the same for all of a step.
_NO_EXAMPLE = 2**62

_BYTE_IS_ENOUGH = 1 / 64


class ExampleMasks:
    """Masks of one forward.

    Attributes:
        num_sites: how many dropouts the forward has come to.
    """

    def __init__(self, seed: int, step: int, examples: Sequence[int] | NDArray[np.int64], placement: Placement) -> None:
        self.num_sites = 0
        self._key = derive_key(seed, step)
        self._placement = placement
        per_example = np.broadcast_to(placement.rows_per_example, len(examples))
        self._examples = np.repeat(np.asarray(examples, dtype=np.int64), per_example)
        self._rows = np.concatenate([np.arange(count) for count in per_example])
        lengths = placement.lengths
        if lengths is not None:
            of_rows = isinstance(placement.rows_per_example, np.ndarray)
            lengths = np.asarray(lengths if of_rows else np.repeat(lengths, per_example), dtype=np.int64)
        self._lengths = lengths
        self._boxes: dict[tuple[int, ...], Boxes] = {}

    def draw(
        self, site: int, shape: Sequence[int], probability: float, device: torch.device, first_row: int | None = None
    ) -> torch.Tensor:
        """Which elements of a tensor are kept.

        Args:
            first_row: the tensor holds attention of some rows only, from this one on; None where it holds all of them.

        Returns:
            Of this shape, int8 or int16, -1 (all bits) for what is kept and 0 for what is dropped; on a GPU bool.
        """
        boxes = self._find_boxes(tuple(shape), first_row)
        key = (self._key, site)
        is_fine = not _BYTE_IS_ENOUGH <= probability <= 1 - _BYTE_IS_ENOUGH
        steps = 2**16 if is_fine else 2**8
        exact = (1 - probability) * steps
        # The sign bit orders integers: the lowest ones are kept.
        limit = math.floor(exact) + int(derive_key(*key) / 2**64 < exact % 1) - steps // 2
        dtype = torch.int16 if is_fine else torch.int8
        if not -(steps // 2) < limit < steps // 2:  # Beyond what a number of this size can be compared with.
            kept = torch.full(tuple(shape), -1 if limit > 0 else 0, dtype=dtype, device=device)
            return kept if device.type == "cpu" else kept.bool()
        if device.type == "cuda":
            on_device = torch.zeros(math.prod(shape), dtype=dtype, device=device)
            fill_on_device(on_device, boxes, key)
            return (on_device < limit).view(*shape)
        numbers = np.zeros(math.prod(shape), dtype=np.int16 if is_fine else np.int8)
        philox.fill(numbers, boxes, key)
        drawn = torch.from_numpy(numbers)
        # clamp gives limit - 1 below the limit and limit elsewhere; minus the limit, that is -1 and 0.
        kept = torch.clamp(drawn, limit - 1, limit, out=drawn).sub_(limit).view(*shape)
        return kept if device.type == "cpu" else kept.bool().to(device)

    def _find_boxes(self, shape: tuple[int, ...], first_row: int | None) -> Boxes:
        known = (*shape, -1 if first_row is None else first_row)
        if known not in self._boxes:
            self._boxes[known] = self._lay_out(shape, first_row)
        return self._boxes[known]

    def _lay_out(self, shape: tuple[int, ...], first_row: int | None) -> Boxes:
        """Where the rows of a tensor lie in it. Every element belongs to a row, or is padding that attention hides."""
        placement, num_rows = self._placement, len(self._examples)
        if first_row is not None:
            return self._lay_out_attention(shape, slice(first_row, first_row + shape[0]))
        if placement.is_packed and self._lengths is not None and shape[:2] == (1, int(self._lengths.sum())):
            counts = self._lengths * math.prod(shape[2:])
            return self._lay_out_rows(counts, np.cumsum(counts) - counts)
        sizes, tokens = placement.sizes, self._lengths
        if len(shape) == 3 and shape[0] != num_rows and shape[0] % num_rows == 0 and {*shape[1:]} <= sizes:
            shape = (num_rows, shape[0] // num_rows, *shape[1:])  # Rows and heads in one.
        if shape[0] != num_rows:
            whole = np.array([math.prod(shape)])
            return Boxes(np.array([_NO_EXAMPLE]), whole * 0, np.array([[1, whole[0]]]), whole * 0)
        if tokens is not None and len(shape) == 4 and shape[3] in sizes and shape[2] in {*sizes, 1}:
            return self._lay_out_attention(shape, slice(0, num_rows))
        counts = np.full(num_rows, math.prod(shape[1:]))
        starts = np.arange(num_rows) * counts
        if tokens is not None and placement.pads_left and len(shape) == 3 and shape[1] in sizes:
            starts, counts = starts + (shape[1] - tokens) * shape[2], tokens * shape[2]
        return self._lay_out_rows(counts, starts)

    def _lay_out_rows(self, counts: NDArray[np.int64], starts: NDArray[np.int64]) -> Boxes:
        sizes = np.column_stack([np.ones_like(counts), counts])
        return Boxes(self._examples, self._rows, sizes, starts)

    def _lay_out_attention(self, shape: tuple[int, ...], rows: slice) -> Boxes:
        _, num_heads, num_queries, num_keys = shape
        examples = self._examples[rows]
        lengths = np.full(len(examples), num_keys) if self._lengths is None else self._lengths[rows]
        # The last layer of some classifiers has one query only (models/last_layer.py).
        queries = np.ones_like(lengths) if num_queries == 1 < num_keys else lengths
        starts = np.arange(len(examples)) * num_heads * num_queries * num_keys
        if self._placement.pads_left:
            starts = starts + (num_queries - queries) * num_keys + num_keys - lengths
        sizes = np.column_stack([queries, lengths])
        return Boxes(examples, self._rows[rows], sizes, starts, num_heads, (num_queries, num_keys))


@dataclass(frozen=True)
class Site:
    """One dropout in one forward."""

    masks: ExampleMasks
    number: int

    def draw(
        self, shape: Sequence[int], probability: float, device: torch.device, first_row: int | None = None
    ) -> torch.Tensor:
        """As `ExampleMasks.draw`."""
        return self.masks.draw(self.number, shape, probability, device, first_row)


# Of the forward that is being computed. Not of a thread: the backward pass recomputes layers in a thread of its own.
_current: ExampleMasks | None = None


def begin(masks: ExampleMasks | None) -> None:
    """Say which examples the next forward computes; None leaves dropout to torch."""
    global _current
    _current = masks


def open_site() -> Site | None:
    """The next dropout of the forward; None where dropout is torch's."""
    if _current is None:
        return None
    _current.num_sites += 1
    return Site(_current, _current.num_sites)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """torch.utils.checkpoint's `context_fn`: what a recomputed layer needs to find the masks that it had."""
    return nullcontext(), _again(_current, 0 if _current is None else _current.num_sites)


@contextmanager
def _again(masks: ExampleMasks | None, num_sites: int) -> Iterator[None]:
    before, reached = _current, 0 if masks is None else masks.num_sites
    begin(masks)
    if masks is not None:
        masks.num_sites = num_sites
    try:
        yield
    finally:
        if masks is not None:
            masks.num_sites = reached
        begin(before)
