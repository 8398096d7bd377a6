"""Random numbers that are a function of the place where they are used: Philox4x64-10, a counter-based generator.

A counter-based generator has no state that goes on from draw to draw: a key and a counter give four numbers (Salmon et al.
2011, "Parallel Random Numbers: As Easy as 1, 2, 3"). Here the key is (seed and step, site) and the counter (block, example,
row of the example, 0), so nobody has to draw in any order. NumPy's generator in C draws on the host; philox_torch.py gives
the same bits on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]


@dataclass(frozen=True)
class Boxes:
    """Which numbers of a tensor are drawn, and from which streams: a box for each row, [heads, queries, keys] in order.

    What is not of attention is a box of one head and one query. Sizes are those of the example itself, not those of the
    batch, so that its numbers are the same beside longer examples.

    Attributes:
        examples: [rows] the example that each row belongs to.
        rows: [rows] its place among the rows of its example.
        sizes: [rows, 2] queries and keys of each box.
        starts: [rows] where each box begins in the flat tensor.
        num_heads: of every box.
        shape: queries and keys of the tensor itself: further ones of a box are drawn, but have no place. None where each box
            lies in one piece.
    """

    examples: NDArray[np.int64]
    rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    num_heads: int = 1
    shape: tuple[int, int] | None = None

    @cached_property
    def counters(self) -> NDArray[np.uint64]:
        """[rows, 4] before the first block of each."""
        counters = np.zeros((len(self.examples), 4), dtype=np.uint64)
        counters[:, 1], counters[:, 2] = self.examples, self.rows
        return counters

    @cached_property
    def places(self) -> list[list[int]]:
        """[rows] queries, keys and start of each."""
        places: list[list[int]] = np.column_stack([self.sizes, self.starts]).tolist()
        return places


def fill(numbers: NDArray[Any], boxes: Boxes, key: Key) -> None:
    """Draw the numbers of every box: the k-th of a box are bytes k x itemsize and following of its stream.

    Args:
        numbers: flat tensor of int8 or int16; what lies in no box is left as it is. Its bytes are in the order of the stream on
            little-endian processors, which all are that PyTorch is built for here.
    """
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64))
    state: Any = generator.state
    state["buffer_pos"] = 4  # The next number begins a new block.
    counter, width, num_heads = state["state"]["counter"], numbers.itemsize, boxes.num_heads
    for counts, (queries, keys, start) in zip(boxes.counters, boxes.places, strict=True):
        counter[:] = counts
        generator.state = state
        count = num_heads * queries * keys
        drawn = generator.random_raw(-(-count * width // 8)).view(numbers.dtype)[:count]
        if boxes.shape is None or boxes.shape == (queries, keys):
            numbers[start : start + count] = drawn
            continue
        num_queries, num_keys = boxes.shape
        inside = min(queries, num_queries), min(keys, num_keys)
        strides = (num_queries * num_keys * width, num_keys * width, width)
        box: NDArray[Any] = np.ndarray((num_heads, *inside), numbers.dtype, numbers.data, start * width, strides)
        box[...] = drawn.reshape(num_heads, queries, keys)[:, : inside[0], : inside[1]]
