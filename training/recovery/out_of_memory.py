"""Out of memory: micro-batches are made smaller, and the step starts again. What is learned stays the same.

One process does that at once. Of several, the others wait in a collective that the one without memory can't join: it
ends the training, and the next start begins with the smaller size, which is noted in the run directory.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from onecurve.training.data.plan import TrainingPlan
from onecurve.training.errors import Fault, write_atomically
from onecurve.training.run_directory import RunDirectory


class OutOfMemory(Fault):
    """A device has too little memory for a micro-batch, and this start can't go on."""

    is_of_one_process = True


class MicroBatchTooLarge(Exception):
    """A forward or backward found no memory. No weight has changed: the step may start again."""


@contextlib.contextmanager
def finding_shortage() -> Iterator[None]:
    """Tell a lack of memory from every other error. For the forward and backward only: an update can't be made again.

    Raises:
        MicroBatchTooLarge: there was too little memory for what stands inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MicroBatchTooLarge from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host as one, had no memory left; each backend says so in its own way."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory")
    )


def shrink(plan: TrainingPlan, step: int) -> tuple[int, int | None]:
    """Half the largest micro-batch of a step, as `max_examples` and `max_tokens`.

    Raises:
        OutOfMemory: it is one example already.
    """
    pieces = [piece.indices for piece in plan.micro_batches(step) if not piece.is_empty]
    lengths = plan.order.lengths
    largest = max(len(piece) for piece in pieces)
    if largest == 1:
        example = max((piece[0] for piece in pieces), key=lambda index: 0 if lengths is None else lengths[index])
        size = "" if lengths is None else f" of {lengths[example]} tokens"
        raise OutOfMemory(
            f"out of memory at step {step + 1}, though micro-batches have one example: example {example}{size} (from 0, of "
            "the training data) does not fit. Lower max_length, or set gradient_checkpointing: true"
        )
    if plan.max_tokens is not None and lengths is not None:
        num_tokens = max(len(piece) * int(lengths[piece].max()) for piece in pieces)
        # The longest example must have room, alone.
        halved = max(int(lengths.max()), min(plan.max_tokens, num_tokens) // 2)
        if halved < plan.max_tokens:
            return plan.max_examples, halved
    return math.ceil(largest / 2), plan.max_tokens


def note_limits(run: RunDirectory, asked: dict[str, Any], found: dict[str, Any]) -> None:
    """Keep what was asked for and what fits, for the next start on the same device."""
    write_atomically(run.memory, json.dumps({"asked": asked, "found": found}) + "\n")


def read_limits(run: RunDirectory, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What was found to fit where the same was asked for; None where nothing was."""
    try:
        noted = json.loads(run.memory.read_text(encoding="utf-8"))
        return dict(noted["found"]) if noted["asked"] == asked else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
