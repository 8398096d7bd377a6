"""ZeRO-3 divides a model before it reaches a device.

DeepSpeed's engine moves a whole model to each device and divides it there, so a model that needs ZeRO-3 would not fit. A
model that is divided already stays where it is.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def divide_model(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Divide a model on the host among the ranks, one parameter at a time on the device; does nothing without ZeRO-3.

    Weights are sent from rank 0. Afterwards parameters are empty until the engine gathers them, so what reads their
    shapes, such as an optimizer's groups, must be built before.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.deepspeed_plugin.zero_stage != 3:
        return
    import deepspeed

    half = _HALF.get(accelerator.mixed_precision)
    if half is not None:  # As the engine does with a model that is not divided yet.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(half)
    config = deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
    config.pop("train_batch_size", None)  # "auto" until the engine starts; here the other sizes say it.
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    # The engine leaves a divided model where it is. Its parameters hold nothing now, so this moves the buffers.
    model.to(accelerator.device)
