"""The topology of this training in words, for the first lines of a run and for environment.json."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


def describe_strategy(accelerator: Accelerator) -> str:
    """The strategy's usual name: one process, DDP, FSDP2, HSDP, ZeRO-2, ..."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        sizes = accelerator.parallelism_config
        if sizes is not None and sizes.dp_replicate_enabled:
            return "HSDP"
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    return "one process" if accelerator.num_processes == 1 else "DDP"


def describe_topology(accelerator: Accelerator) -> dict[str, Any]:
    """Processes, strategy and device, for environment.json."""
    device = accelerator.device
    return {
        "num_processes": accelerator.num_processes,
        "num_machines": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        "strategy": describe_strategy(accelerator),
        "backend": accelerator.state.backend,
        "device": device.type,
        "device_name": _describe_device(device),
        "threads_per_process": torch.get_num_threads(),
    }


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
