"""Numbers of a device: the host goes on, and reads them behind an event."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from onecurve.training.record.late_values import LateValues


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_read_as_they_are(dtype: torch.dtype) -> None:
    assert LateValues(torch.tensor([0.1, 3.0, float("inf")], dtype=dtype)).read() == [
        float(torch.tensor(0.1, dtype=dtype)), 3.0, float("inf"),
    ]  # fmt: skip


class Operators(TorchDispatchMode):
    """Notes what is done with tensors."""

    def __init__(self, noted: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noted = noted

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if not str(operator).startswith(("aten.detach", "prim.device")):
            self._noted.append((str(operator), str(options.get("device")), options.get("non_blocking")))
        return operator(*arguments, **options)


def test_a_gpu_is_waited_for_only_behind_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tensor that only says that it is on a GPU, and an event that only notes what it is asked."""
    noted: list[Any] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            pass

        def record(self) -> None:
            noted.append("record")

        def synchronize(self) -> None:
            noted.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    with FakeTensorMode(), Operators(noted):
        values = LateValues(torch.empty(4, device="cuda"))
    copy = ("aten._to_copy.default", "cpu", True)
    assert noted[1:] == [copy, "record"], "nothing is read yet, and the copy does not block"
    values._values = torch.ones(4)  # What a real copy would hold.
    assert values.read() == [1.0] * 4
    assert noted[3:] == ["synchronize"]
