"""The beginning of a micro-batch: accelerate's counter, and the seed of the step's random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from onecurve.training.data.permutation import derive_key
from onecurve.training.data.plan import MicroBatch


def begin_micro_batch(accelerator: Accelerator, plan: MicroBatch, seed: int) -> float:
    """Set accelerate's counter to this micro-batch's position in its step; return the factor for its loss.

    accelerate counts micro-batches modulo a fixed number. Here the number differs from step to step, so the counter is
    set each time. Gradients are averaged over processes, and `backward` divides by the number of micro-batches, except
    under DeepSpeed. The factor undoes both, for a loss that is already divided by the count of the whole step.

    Random numbers (dropout) depend on (seed, step, rank) only, so that a resumed run draws the same ones.
    """
    accelerator.gradient_accumulation_steps = plan.num_micro_batches
    accelerator.step = plan.position
    if plan.position == 0:
        key = derive_key(seed, plan.step, accelerator.process_index) >> 1
        torch.manual_seed(key)
        random.seed(key)  # Some models draw from Python's and NumPy's numbers, as BigBird its random blocks.
        np.random.seed(key % 2**32)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return float(accelerator.num_processes)
    return float(accelerator.num_processes * plan.num_micro_batches)
