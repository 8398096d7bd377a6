"""Out of memory: smaller micro-batches, and the step again. The loss curve stays the same.

A single process does that immediately. With several, the other ranks wait in a collective that the rank without memory
cannot join: it ends the training, and the next start uses the smaller size, which is stored in the run directory.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from onecurve.training.atomic_files import write_atomically
from onecurve.training.data.plan import TrainingPlan
from onecurve.training.errors import Fault
from onecurve.training.run_directory import RunDirectory


class OutOfMemory(Fault):
    """A device has too little memory for a micro-batch, and this start cannot continue."""

    is_of_one_rank = True


class MicroBatchTooLarge(Exception):
    """A forward or backward ran out of memory. No weight has changed, so the step can be repeated."""


@contextlib.contextmanager
def detect_out_of_memory() -> Iterator[None]:
    """Convert an out-of-memory error. For the forward and backward only: an update cannot be repeated.

    Raises:
        MicroBatchTooLarge: the code inside ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MicroBatchTooLarge from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host, ran out of memory; each backend, cuBLAS and cuDNN have their own texts."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error)
        for text in ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")
    )


def shrink(plan: TrainingPlan, step: int) -> tuple[int, int | None]:
    """Half the largest micro-batch of a step, as `max_examples` and `max_tokens`.

    Raises:
        OutOfMemory: it is a single example.
    """
    pieces = [piece.indices for piece in plan.micro_batches(step) if not piece.is_empty]
    lengths = plan.order.lengths
    largest = max(len(piece) for piece in pieces)
    if largest == 1:
        example = max((piece[0] for piece in pieces), key=lambda index: 0 if lengths is None else lengths[index])
        size = "" if lengths is None else f" of {lengths[example]} tokens"
        raise OutOfMemory(
            f"out of memory at step {step + 1} with a micro-batch of one example: example {example}{size} (counted from 0, of "
            "the training data) does not fit. Lower max_length, or set gradient_checkpointing: true"
        )
    if plan.max_tokens is not None and lengths is not None:
        num_tokens = max(
            int(lengths[piece].sum() if plan.is_packed else len(piece) * lengths[piece].max()) for piece in pieces
        )
        # The longest example must fit on its own.
        halved = max(int(lengths.max()), min(plan.max_tokens, num_tokens) // 2)
        if halved < plan.max_tokens:
            return plan.max_examples, halved
    return math.ceil(largest / 2), plan.max_tokens


def save_limits(run: RunDirectory, asked: dict[str, Any], found: dict[str, Any]) -> None:
    """Store which size was asked for and which one fits, for the next start on the same device."""
    write_atomically(run.memory, json.dumps({"asked": asked, "found": found}) + "\n")


def load_limits(run: RunDirectory, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The size that fits, if an earlier start asked for the same and ran out of memory; else None."""
    try:
        stored = json.loads(run.memory.read_text(encoding="utf-8"))
        return dict(stored["found"]) if stored["asked"] == asked else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
