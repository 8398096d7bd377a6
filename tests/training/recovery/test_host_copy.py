"""A checkpoint's copy in host memory: the same bits, the same memory again, and no pinned memory but one buffer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onecurve.training.parallel.gathering import Transfers
from onecurve.training.recovery.host_copy import HostCopy, copy_in_pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7)])
@pytest.mark.parametrize("buffer_bytes", [5, 8, 1000])
def test_pieces_add_up_to_the_same_bits(dtype: torch.dtype, shape: tuple[int, ...], buffer_bytes: int) -> None:
    torch.manual_seed(0)
    source = (torch.randn(shape) * 100).to(dtype)
    target = torch.zeros(shape, dtype=dtype)
    copy_in_pieces(source, target, torch.empty(buffer_bytes, dtype=torch.uint8))
    assert torch.equal(source, target)


def test_a_transposed_tensor_is_copied_by_its_numbers() -> None:
    source = torch.arange(12).view(3, 4).T
    target = torch.empty(4, 3, dtype=torch.int64)
    copy_in_pieces(source, target, torch.empty(10, dtype=torch.uint8))
    assert torch.equal(source, target)


def test_a_tensor_that_is_stored_again_reuses_its_memory() -> None:
    copy = HostCopy()
    copy.store("a", torch.ones(3), Transfers())
    place = copy.tensors["a"].data_ptr()
    copy.store("a", torch.full((3,), 2.0), Transfers())
    assert copy.tensors["a"].tolist() == [2.0, 2.0, 2.0]
    assert copy.tensors["a"].data_ptr() == place
    assert copy.count_bytes() == 12


def test_only_the_buffer_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor on a GPU, which is played by one on the CPU."""
    pinned: list[int] = []
    empty = torch.empty

    def allocate(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made: torch.Tensor = empty(*size, **options)
        if pin_memory:
            pinned.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("onecurve.training.recovery.host_copy._BUFFER_BYTES", 100)
    copy = HostCopy()
    for name in ("a", "b"):
        copy.store(name, torch.arange(1000), Transfers())
    assert pinned == [100]
    assert all(torch.equal(tensor, torch.arange(1000)) for tensor in copy.tensors.values())
