"""Numbers that a device computes, read on the host some steps later."""

from __future__ import annotations

import torch


class LateValues:
    """A few numbers, on their way from a GPU to the host; the host goes on.

    `tolist` of a tensor on a GPU waits for everything that is queued there, even if the tensor was ready long ago. An event
    behind the copy is reached as soon as this copy is complete.

    Args:
        values: [count] numbers on any device.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            # A copy that does not block goes to pinned memory, which torch allocates for it and reuses.
            values = values.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._values = values

    def read(self) -> list[float]:
        """The numbers, as soon as the device has computed them; later work in its queue is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
