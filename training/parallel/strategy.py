"""The Accelerator for the topology that `accelerate launch` set up, and proof that it is the one that was asked for.

A topology is chosen by an accelerate YAML and reaches this process as environment variables. Two things can go wrong
without a word: fewer processes than asked for (each then trains the same model alone), and a strategy that accelerate
skips because no accelerator is present. The first is refused here. The second is what rehearsal is about: with no
accelerator on the machine, DDP, FSDP2 and DeepSpeed run for real over gloo (rehearsal.py): a laptop tries what a
cluster runs.
"""

from __future__ import annotations

import os
import platform
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    broadcast_object_list,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from onecurve.training.config import Recipe
from onecurve.training.data.plan import MicroBatch, derive_key
from onecurve.training.errors import BadInput, Fault, LostLauncher, WrongTopology, is_main_process
from onecurve.training.parallel import rehearsal

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Launched:
    """What the launcher told this process, read from the environment."""

    process: int
    num_processes: int
    is_distributed: bool
    uses_deepspeed: bool
    uses_fsdp: bool
    uses_cpu: bool

    @classmethod
    def from_environment(cls) -> Launched:
        """Read torchrun's and accelerate's variables."""
        environment = os.environ
        return cls(
            process=int(environment.get("RANK", "0")),
            num_processes=int(environment.get("WORLD_SIZE", "1")),
            is_distributed="LOCAL_RANK" in environment,
            uses_deepspeed=environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true",
            uses_fsdp=environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
            uses_cpu=environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"),
        )


def check_launch(recipe: Recipe) -> None:
    """Refuse a launch that lost its processes, or a machine that can't do what the recipe asks, before anything else.

    Raises:
        WrongTopology: fewer processes came up than the launcher was asked for.
        BadInput: the tracker is not installed, or the device has no arithmetic of the recipe's mixed_precision.
    """
    if recipe.report_to != "none" and recipe.report_to not in {str(name) for name in get_available_trackers()}:
        raise BadInput(f"report_to: {recipe.report_to} is not installed; `pip install onecurve[trackers]` brings it")
    missing = find_missing_precision(recipe)
    if missing is not None:
        raise BadInput(missing)
    check_processes()


def find_missing_precision(recipe: Recipe) -> str | None:
    """Why this device has no arithmetic of the recipe's mixed_precision; None if it has."""
    device = _find_device(Launched.from_environment())
    if recipe.mixed_precision == "fp16" and device in ("cpu", "mps"):
        return f"mixed_precision: fp16 needs a GPU, this is {device}; use bf16 or no"
    if (
        recipe.mixed_precision == "bf16"
        and device == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "mixed_precision: this GPU has no bf16 arithmetic (Ampere or newer has); use fp16 or no"
    return None


def check_processes() -> None:
    """Refuse a launch that lost its processes.

    Raises:
        WrongTopology: fewer processes came up than the launcher was asked for.
    """
    launched = Launched.from_environment()
    asked = os.environ.get("ONECURVE_NUM_PROCESSES")
    if asked is not None and asked != str(launched.num_processes):
        raise WrongTopology(
            f"{asked} processes were asked for, {launched.num_processes} came up; "
            "each would train the same model alone. Use a YAML of accelerate_configs/, such as multi_cpu.yaml."
        )
    # accelerate's one-process launcher sets the address for a group of processes, then starts only one.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise WrongTopology(
            "several processes were asked for, one came up: `accelerate launch --cpu --num_processes N` and "
            "`distributed_type: MULTI_CPU` start a single process. Use accelerate_configs/multi_cpu.yaml."
        )


def _find_device(launched: Launched) -> str:
    """The kind of device that training will run on: cuda, mps, xpu, ... or cpu."""
    device = None if launched.uses_cpu else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def build_accelerator(recipe: Recipe, model: torch.nn.Module, timeout: timedelta) -> Accelerator:
    """Join the process group and return the Accelerator, ready to shard `model`.

    Args:
        timeout: the longest that a collective may take; longer than the watchdog's limits, which says more of a hang.

    Raises:
        WrongTopology: the group has another size than the launcher set up.
        LostLauncher: it died meanwhile.
    """
    launched = Launched.from_environment()
    check_store()
    has_accelerator = _find_device(launched) != "cpu"
    if not has_accelerator:
        # oneDNN compiles its kernels for each shape, and keeps the last 1024 of them. Batches of many lengths need more, and
        # would be compiled for anew in each epoch.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    shards = launched.is_distributed and (launched.uses_deepspeed or launched.uses_fsdp)
    if shards and not has_accelerator:
        rehearsal.join_group(launched.uses_deepspeed, timeout)
    accelerator = Accelerator(
        cpu=not has_accelerator and not shards,
        mixed_precision=recipe.mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            # The buffers of transformers are constants; DDP would send them with each forward.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
        # The plan says how many micro-batches a step has and when it ends; the end of the loader says nothing.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        step_scheduler_with_optimizer=False,
        # Layer by layer: one compilation serves all layers, and the whole model would be compiled anew for each length.
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", use_regional_compilation=True)
        if recipe.torch_compile
        else None,
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_dir=recipe.output_dir,
    )
    if accelerator.num_processes != launched.num_processes:
        raise WrongTopology(
            f"the launcher started {launched.num_processes} processes, but this one found a group of "
            f"{accelerator.num_processes}; each would train the same model alone"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.deepspeed_plugin.deepspeed_config
        # The recipe owns these; the plan has already cut the batch, so the engine must not divide again.
        config["gradient_clipping"] = recipe.max_grad_norm
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_accumulation_steps"] = 1
        # The whole model is loaded already; the engine cuts it up. While this is set, transformers would load parts.
        unset_hf_deepspeed_config()
    _choose_sharded_layers(accelerator, model)
    return accelerator


def check_store() -> None:
    """Refuse to look for the other processes in a store that is gone: torch would knock as long as a collective may take.

    torch's agent, which is the launcher or the first machine's, holds the store and opens it before it starts anyone.

    Raises:
        LostLauncher: it is gone.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        socket.create_connection(address, timeout=10).close()
    except ConnectionRefusedError:
        raise LostLauncher from None
    except OSError:
        pass  # Slow, perhaps, where thousands knock at once: torch tries again.


def _choose_sharded_layers(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Tell FSDP which modules to gather at a time, where the YAML names none: the model's repeated layers.

    accelerate would take every class that transformers lists as not to be split. For BERT and its kin that includes the
    embeddings, which accelerate then shards a second time on their own, and fails.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap:
        return
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    names = {type(module).__name__ for module in model.modules()}
    holders = {type(module).__name__ for module in model.modules() if embedding in module.modules()}
    plugin.transformer_cls_names_to_wrap = sorted(
        (set(getattr(model, "_no_split_modules", None) or []) & names) - holders
    )


def ask_main_process(question: Callable[[], Answer]) -> Answer:
    """The answer of process 0, on every process. What it refuses, all refuse.

    Raises:
        Fault: as `question` on process 0.
    """
    told: list[Any] = [None, None]
    if is_main_process():
        try:
            told[0] = question()
        except Fault as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    answer: Answer = told[0]
    return answer


def describe_strategy(accelerator: Accelerator) -> str:
    """The strategy in the field's words: one process, DDP, FSDP2, ZeRO-2, ..."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
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


def measure_peak_memory() -> int:
    """The most bytes that this process has held so far: of its GPU if it has one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def begin_micro_batch(accelerator: Accelerator, plan: MicroBatch, seed: int) -> float:
    """Tell accelerate where in its step this micro-batch stands; returns what its loss must be multiplied by.

    accelerate counts micro-batches modulo a fixed number; here the number differs from step to step, so the counter is
    set each time. Gradients are averaged over processes, and `backward` divides by the number of micro-batches except
    under DeepSpeed; the factor undoes both, for a loss that was already divided by the count of the whole step.

    Random numbers (dropout) are a function of (seed, step, process), so that a resumed run draws the same ones.
    """
    accelerator.gradient_accumulation_steps = plan.num_micro_batches
    accelerator.step = plan.position
    if plan.position == 0:
        torch.manual_seed(derive_key(seed, plan.step, accelerator.process_index) >> 1)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return float(accelerator.num_processes)
    return float(accelerator.num_processes * plan.num_micro_batches)


def forget_state() -> None:
    """Forget accelerate's global state, so that a process can train again."""
    AcceleratorState._reset_state(reset_partial_state=True)
