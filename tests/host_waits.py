"""What would make the host wait for a GPU, found without one."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A number that is read, a mask whose ones are counted, a tensor made of Python's numbers, which is copied from pageable memory,
# and results of a size or a truth that depends on values. What torch computes of these on a CPU in another way than on a GPU
# is named by what the program asks for.
_WAITS = (
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.lift_fresh", "aten.equal", "aten._unique",
    "aten.unique", "aten.bincount", "aten.repeat_interleave.Tensor", "aten.is_nonzero",
)  # fmt: skip

# Works on the host, and copies from pinned memory.
_ON_THE_HOST = "training/data/"


class HostWaits(TorchDispatchMode):
    """As a context, notes each wait as the innermost file outside torch; those inside transformers apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: list[str] = []
        self.places_in_models: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Run the operator, and note it if it waits."""
        name = str(operator)
        is_mask = name.startswith(("aten.index.", "aten.index_put", "aten._index_put")) and any(
            each is not None and each.dtype == torch.bool for each in arguments[1]
        )
        is_known = "repeat_interleave" in name and (options or {}).get("output_size") is not None
        if (is_mask or name.startswith(_WAITS)) and not is_known:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-1]
            file = frames[-1].filename
            if _ON_THE_HOST not in file:
                places = self.places_in_models if "transformers" in file else self.places
                places.append(f"{name} in {file}:{frames[-1].lineno}")
        return operator(*arguments, **(options or {}))
