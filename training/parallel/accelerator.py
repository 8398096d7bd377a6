"""The Accelerator for the topology that `accelerate launch` set up.

Without a GPU, accelerate would silently skip FSDP2 and DeepSpeed. rehearsal.py makes it run them over gloo, so that a
laptop can try what a cluster runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from onecurve.training.config import Recipe
from onecurve.training.errors import BadInput, WrongTopology
from onecurve.training.parallel import rehearsal
from onecurve.training.parallel.host_adam import build_host_adam
from onecurve.training.parallel.launch import Launch, check_store
from onecurve.training.zero_buffers import (
    SUB_GROUP,
    count_bucket,
    count_live_parameters,
    count_prefetched_parameters,
)


def build_accelerator(recipe: Recipe, model: torch.nn.Module, timeout: timedelta) -> Accelerator:
    """Join the process group and return the Accelerator, ready to shard `model`.

    Args:
        timeout: of a collective. It must be longer than the watchdog's limits, because the watchdog reports more.

    Raises:
        WrongTopology: the process group has another size than the launcher set.
        LostLauncher: the launcher has died.
    """
    launch = Launch.from_environment()
    check_store()
    choose_algorithms(recipe)
    has_accelerator = launch.find_device_type() != "cpu"
    if not has_accelerator:
        # oneDNN compiles a kernel for each shape and caches the last 1024. Batches of many lengths need more; without
        # them it would compile again in each epoch.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    shards = launch.is_distributed and (launch.uses_deepspeed or launch.uses_fsdp)
    if shards and not has_accelerator:
        rehearsal.join_group(launch.uses_deepspeed, timeout)
    accelerator = Accelerator(
        cpu=not has_accelerator and not shards,
        mixed_precision=recipe.mixed_precision,
        # Whatever the YAML says: it would compile the whole model, and turn float32 products on a GPU into TF32.
        dynamo_backend="no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            # The buffers of transformers are constants; DDP would broadcast them in each forward. As views into DDP's
            # buckets, gradients need no second copy.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
        # The plan sets how many micro-batches a step has and when it ends, not the end of the loader.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        step_scheduler_with_optimizer=False,
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_dir=recipe.output_dir,
    )
    if accelerator.num_processes != launch.num_processes:
        raise WrongTopology(
            f"the launcher started {launch.num_processes} processes, but the process group has "
            f"{accelerator.num_processes}; each would train the same model alone"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        set_engine(accelerator.deepspeed_plugin.deepspeed_config, recipe, _count_parameters(model))
        # The whole model is loaded already and the engine shards it. While this is set, transformers would load shards.
        unset_hf_deepspeed_config()
    if recipe.base_dtype != "float32" and accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
    ):
        raise BadInput(
            f"base_dtype: {recipe.base_dtype} is for one process and DDP; FSDP2 and DeepSpeed hold all weights of a layer in one "
            "type, so take float32: they divide it among the processes"
        )
    if recipe.quantization != "none":
        _check_quantization(accelerator)
    _choose_sharded_layers(accelerator, model)
    _reduce_in_float32(accelerator)
    # NCCL connects the ranks in the first collective. Here it is under the limit of a join, not under that of a step.
    accelerator.reduce(torch.zeros(1, device=accelerator.device)).cpu()
    return accelerator


def _check_quantization(accelerator: Accelerator) -> None:
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise BadInput(
            "quantization: nf4 is for one process and DDP; FSDP2 and DeepSpeed would divide weights that lie two in a byte, so "
            "take none: they divide whole ones among the processes"
        )
    if accelerator.device.type not in ("cpu", "cuda"):
        raise BadInput(
            f"quantization: nf4 is for CPUs and CUDA GPUs, not for {accelerator.device.type}; remove the key"
        )


def build_offload_optimizer(accelerator: Accelerator) -> None:
    """Compile DeepSpeed's optimizer for the host under this project's lock, where the engine would use it, GPUs or not.

    A start that is killed while the engine compiles leaves a lock file for which every later start waits.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    zero = accelerator.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        build_host_adam()


def choose_algorithms(recipe: Recipe) -> None:
    """Which algorithms torch may choose from: call it before anything runs on a GPU.

    With `deterministic`, only those that give the same bits again, attention's among them; an operation that has none raises
    an error that names it. cuDNN's attention is never used: it is built anew for every length of a batch, which took half of
    a BERT-large's steps on an H100 (benchmarks/NOTES.md). What a recipe calls float32 is never TF32, in convolutions neither.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(recipe.deterministic)
    # Filling memory that is written later would cost time and hide nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts.


def set_engine(config: dict[str, Any], recipe: Recipe, num_parameters: int) -> None:
    """Set what accelerate's YAML has no keys for in the config of DeepSpeed's engine.

    Args:
        num_parameters: of the model, trained and frozen.
    """
    # The recipe sets these. The plan has already divided the batch, so the engine must not divide it again.
    config["gradient_clipping"] = recipe.max_grad_norm
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = 1
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") in (1, 2):
        # By default ZeRO-1 and 2 reduce gradients when all of them are computed, unlike ZeRO-3. With the overlap they hold
        # two buckets.
        zero.setdefault("overlap_comm", True)
        zero.setdefault("reduce_bucket_size", count_bucket(zero["stage"], num_parameters) // 2)
    elif zero.get("stage") == 3:
        live = count_live_parameters(num_parameters)
        zero.setdefault("reduce_bucket_size", count_bucket(3, num_parameters))
        zero.setdefault("stage3_max_live_parameters", live)
        zero.setdefault("stage3_max_reuse_distance", live)
        zero.setdefault("stage3_prefetch_bucket_size", count_prefetched_parameters(num_parameters))
        zero.setdefault("sub_group_size", SUB_GROUP)


def _count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _reduce_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 add gradients in float32, over ranks and micro-batches, as DDP does.

    accelerate's policy for bf16 and fp16 adds them in 2 bytes, and rounds what each layer returns.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.mixed_precision_policy is None:
        return
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
    )


def _choose_sharded_layers(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Set which modules FSDP gathers at a time, if the YAML names none: the model's repeated layers.

    accelerate would take every class that transformers lists in `_no_split_modules`. For BERT and related models, that
    includes the embeddings, which accelerate then shards a second time on their own, and fails.
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


@contextmanager
def second_names_removed(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """While FSDP2 divides a model, take away second names of its output layer's parameters, such as BERT's predictions.bias.

    accelerate puts the output layer into one group and what is left into another. FSDP2 refuses a parameter that both see.
    No forward reads these names; afterwards they are there again, so that parameters are called as on other topologies.
    """
    output = model.get_output_embeddings() if accelerator.distributed_type == DistributedType.FSDP else None
    if output is None:
        yield
        return
    embedding = model.get_input_embeddings()
    own = {id(parameter): name for name, parameter in output.named_parameters(recurse=False)}
    holders = [
        (module, dict(module._parameters))
        for module in model.modules()
        if module not in (output, embedding) and any(id(each) in own for each in module._parameters.values())
    ]
    for module, parameters in holders:
        for name, parameter in parameters.items():
            if id(parameter) in own:
                del module._parameters[name]
    yield
    for module, parameters in holders:
        divided = {
            name: output._parameters[own[id(each)]] if id(each) in own else module._parameters[name]
            for name, each in parameters.items()
        }
        module._parameters.clear()
        module._parameters.update(divided)


def forget_state() -> None:
    """Reset accelerate's global state, so that a process can train again."""
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def shared_embeddings_at_the_root(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Let FSDP2 shard embeddings that more than two modules share (T5, BART) with the rest of the model; around `prepare`.

    accelerate puts the input and the output embedding into a group of their own. Encoder and decoder hold the same weights in
    modules of theirs, which then belong to no group that is gathered for them, and torch refuses that.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        yield
        return
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    holders = {module for module in model.modules() if getattr(module, "weight", None) is weight}
    if weight is None or not holders - {embedding, output}:
        yield
        return
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings
