"""Smaller micro-batches after a device ran out of memory. Whole trainings: tests/test_faults.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onecurve.training.data.plan import Order, TrainingPlan
from onecurve.training.recovery.out_of_memory import OutOfMemory, is_out_of_memory, load_limits, save_limits, shrink
from onecurve.training.run_directory import RunDirectory

LENGTHS = np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 10])


def plan(max_examples: int, max_tokens: int | None = None) -> TrainingPlan:
    return TrainingPlan(Order(10, 10, 42, LENGTHS), 5, 1, max_examples, max_tokens)


def test_examples_are_halved_until_one_is_left() -> None:
    assert shrink(plan(64), 0) == (5, None), "half of the ten that there are"
    assert shrink(plan(5), 0) == (3, None)
    assert shrink(plan(3), 0) == (2, None)
    assert shrink(plan(2), 0) == (1, None)
    with pytest.raises(OutOfMemory, match=r"step 1 .* example 9 of 10 tokens"):
        shrink(plan(1), 0)


def test_tokens_are_halved_down_to_the_longest_example_and_then_examples() -> None:
    assert shrink(plan(64, 40), 0) == (64, 18), "half of the 36 that the largest micro-batch has"
    assert shrink(plan(64, 18), 0) == (64, 10)
    max_examples, max_tokens = shrink(plan(64, 10), 0)
    assert max_tokens == 10
    assert max_examples < 10


def test_packed_tokens_are_counted_without_padding() -> None:
    packed = TrainingPlan(Order(10, 10, 42, LENGTHS), 5, 1, 64, 40, is_packed=True)
    assert shrink(packed, 0) == (64, 14), "half of the 28 that the largest micro-batch has"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("whatever"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_fits_holds_for_what_was_asked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert load_limits(run, {"size": 8}) is None
    save_limits(run, {"size": 8}, {"max_examples": 4, "max_tokens": None})
    assert load_limits(run, {"size": 8}) == {"max_examples": 4, "max_tokens": None}
    assert load_limits(run, {"size": 16}) is None
    run.memory.write_text("{")
    assert load_limits(run, {"size": 8}) is None
