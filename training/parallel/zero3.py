"""ZeRO-3 divides a model before it reaches a device.

DeepSpeed's engine moves a whole model to each device and divides it there, so a model that needs ZeRO-3 would not fit. A
model that is divided already stays where it is.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from onecurve.training.models.shares import Shares, is_reserved, reserve
from onecurve.training.parallel.deepspeed_states import put_own_part

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def divide_model(accelerator: Accelerator, model: torch.nn.Module, shares: Shares | None = None) -> None:
    """Divide a model on the host among the ranks, one parameter at a time on the device; does nothing without ZeRO-3.

    Weights are sent from rank 0, and those of which each rank has its part are replaced by it. Afterwards parameters are empty
    until the engine gathers them, so what reads their shapes, such as an optimizer's groups, must be built before.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.deepspeed_plugin.zero_stage != 3:
        return
    import deepspeed

    half = _HALF.get(accelerator.mixed_precision)
    if half is not None:  # As the engine does with a model that is not divided yet.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                data = parameter.data
                parameter.data = reserve(data.shape, half) if is_reserved(data) else data.to(half)
    config = deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
    config.pop("train_batch_size", None)  # "auto" until the engine starts; here the other sizes say it.
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    if shares is not None:
        for name, parameter in model.named_parameters():
            if name in shares.parts:
                put_own_part(parameter, shares.parts[name])
    # The engine leaves a divided model where it is. Its parameters hold nothing now, so this moves the buffers.
    model.to(accelerator.device)
