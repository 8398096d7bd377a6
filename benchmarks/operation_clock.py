"""How long each operation of a model takes, timed where torch dispatches it.

Not with torch.profiler: its records break up the memory that a step leaves to the next one, and a step whose tensors need fresh
pages takes a third longer, most of it in softmax.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

MATRIX_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "linear", "matmul")
"""Operations that are matrix products, by the name that the clock gives them."""


class OperationClock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the seconds of every operation of this thread; on a CPU one is over when its call returns.

    Attributes:
        seconds: by the operation's name, such as "mm".
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        started = time.perf_counter()
        result = operation(*arguments, **(options or {}))
        self.seconds[operation.overloadpacket.__name__] += time.perf_counter() - started
        return result
