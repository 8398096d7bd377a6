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
    def table(self) -> NDArray[np.int64]:
        """[rows, 5]: example, row of the example, queries, keys, start."""
        return np.column_stack([self.examples, self.rows, self.sizes, self.starts]).astype(np.int64)


def fill(numbers: NDArray[Any], boxes: Boxes, key: Key) -> None:
    """Draw the numbers of every box: the k-th of a box are bytes k x itemsize and following of its stream.

    Args:
        numbers: flat tensor of int8 or int16; what lies in no box is left as it is.
    """
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64))
    state: Any = generator.state
    counter, width = state["state"]["counter"], numbers.itemsize
    state["buffer_pos"] = 4  # The next number begins a new block.
    for example, row, queries, keys, start in boxes.table.tolist():
        counter[:] = (0, example, row, 0)
        generator.state = state
        count = boxes.num_heads * queries * keys
        words = generator.random_raw(-(-count * width // 8))
        drawn = words.astype("<u8", copy=False).view(numbers.dtype)[:count]
        if boxes.shape is None or boxes.shape == (queries, keys):
            numbers[start : start + count] = drawn
            continue
        num_queries, num_keys = boxes.shape
        inside = min(queries, num_queries), min(keys, num_keys)
        strides = (num_queries * num_keys * width, num_keys * width, width)
        box: NDArray[Any] = np.ndarray(
            (boxes.num_heads, *inside), numbers.dtype, numbers.data, start * width, strides
        )
        box[...] = drawn.reshape(boxes.num_heads, queries, keys)[:, : inside[0], : inside[1]]
