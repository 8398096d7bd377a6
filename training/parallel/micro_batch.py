"""The beginning of a micro-batch: accelerate's counter, and the random numbers of its step."""

from __future__ import annotations

import random

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from onecurve.training.data.permutation import derive_key
from onecurve.training.data.plan import MicroBatch
from onecurve.training.models import example_masks
from onecurve.training.recipe import Recipe


def begin_micro_batch(accelerator: Accelerator, plan: MicroBatch, recipe: Recipe) -> float:
    """Set accelerate's counter to this micro-batch's position in its step; return the factor for its loss.

    accelerate counts micro-batches modulo a fixed number. Here the number differs from step to step, so the counter is
    set each time. Gradients are averaged over processes, and `backward` divides by the number of micro-batches, except
    under DeepSpeed. The factor undoes both, for a loss that is already divided by the count of the whole step.

    Dropout masks are by example, or torch's own, which depend on (seed, step, rank); a resumed run draws the same ones.
    """
    accelerator.gradient_accumulation_steps = plan.num_micro_batches
    accelerator.step = plan.position
    if recipe.dropout_masks == "by_example":
        example_masks.begin(example_masks.ExampleMasks(recipe.seed, plan.step, plan.indices, plan.placement))
        # Of what a model draws besides, such as the layers that it skips, every micro-batch of a step draws the same.
        _seed(derive_key(recipe.seed, plan.step), accelerator.device)
    else:
        example_masks.begin(None)
        if plan.position == 0:
            _seed(derive_key(recipe.seed, plan.step, accelerator.process_index), accelerator.device)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return float(accelerator.num_processes)
    return float(accelerator.num_processes * plan.num_micro_batches)


def _seed(key: int, device: torch.device) -> None:
    """Seed what a model may draw from: here and on this device.

    `torch.manual_seed` formats the whole stack for each kind of device that is not there, each time.
    """
    key >>= 1
    torch.default_generator.manual_seed(key)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(key)
    random.seed(key)  # Some models draw from Python's and NumPy's numbers, as BigBird its random blocks.
    np.random.seed(key % 2**32)
