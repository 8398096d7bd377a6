"""How much memory a training step needs on each device, under every strategy: arithmetic on a model's shape.

A step holds, in bytes, with N parameters and P processes (Rajbhandari et al. 2020, "ZeRO", section 3.1, with float32
weights as this project trains them: 4 + 4 + 8 bytes per parameter):

    strategy     weights        gradients   AdamW's moments   buffers
    one process  4N             4N          8N                -
    DDP          4N             4N          8N                4N: the reducer's buckets
    ZeRO-1       4N             4N          8N/P              4N/P: the engine's own copy of its part; the bucket
    ZeRO-2       4N             4N/P        8N/P              4N/P; the bucket
    ZeRO-3       4N/P           4N/P        8N/P              the bucket; gathered weights
    FSDP2        4N/P           4N/P        8N/P              two gathered layers and one layer's gradients
    HSDP         as FSDP2, with the processes of one machine as P

With an adapter, N counts the trained parameters only in gradients, moments, buckets and DeepSpeed's copies.

Gradients move through DeepSpeed's bucket, which it allocates whole (training/zero_buffers.py), so ZeRO-1 holds gradients of
its own only if several micro-batches are accumulated. ZeRO-3 keeps gathered weights up to its max_live_parameters, and in a
step, when it has let go of them, copies the gradients of a sub-group. In float32 it holds its part of the weights once
(training/parallel/deepspeed_states.py).

To these come the activations that the backward pass needs (`count_activations`). With bf16 DeepSpeed holds 2-byte weights and
gradients and a 4-byte master copy; DDP and FSDP keep float32 and hold 2-byte copies of the weights while they are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.planning.work import Work
from onecurve.launcher.units import GIB
from onecurve.training.architectures import count_block_scores
from onecurve.training.run_directory import count_held_bytes
from onecurve.training.zero_buffers import SUB_GROUP, count_bucket, count_live_parameters

Strategy = Literal[
    "one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "ZeRO-2 offload", "ZeRO-3 offload", "FSDP2 offload",
    "HSDP", "HSDP offload",
]  # fmt: skip
STRATEGIES: tuple[Strategy, ...] = (
    "one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "ZeRO-2 offload", "ZeRO-3 offload", "FSDP2 offload",
)  # fmt: skip
"""Those that need no second machine; HSDP has on one what FSDP2 has."""

# What a process holds before it has a model: the CUDA context and NCCL's buffers on a GPU; on a CPU, Python with
# PyTorch and transformers imported. Both are rounded estimates.
GPU_OVERHEAD_BYTES = int(1.2 * GIB)
CPU_OVERHEAD_BYTES = int(0.6 * GIB)
# Usable share of a device; the rest is lost to fragmentation in the allocator.
USABLE_SHARE = 0.92
# Share of a machine's memory that offloading may use; the rest is left for the processes.
USABLE_HOST_SHARE = 0.9
# NF4 (QLoRA, section 3): half a byte, one for the scale of 64 weights, and four for that of 256 scales.
_BYTES_PER_QUANTIZED = 1 / 2 + 1 / 64 + 4 / (64 * 256)
_LARGEST_BATCH_TRIED = 1 << 16


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, and on the host if the strategy offloads to it."""

    strategy: Strategy
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    peak: int
    host: int = 0


def count_activations(shape: ModelShape, work: Work) -> tuple[int, int]:
    """Bytes that the backward pass needs, and bytes of temporaries at its peak.

    Tensor by tensor what autograd saves in one layer, after Korthikanti et al. 2022 ("Reducing Activation Recomputation
    in Large Transformer Models", section 4), for the precisions used here. T tokens, hidden size h, feed-forward size f:
    BERT in float32 keeps per layer the inputs of the query, key and value projections (Th), their outputs (3Th), the
    context (Th), both norms' inputs and the first one's output (3Th), two dropout masks, and the feed-forward's two
    intermediate results (2Tf). Attention adds probabilities, mask and dropped probabilities (3 heads x length^2 per
    example) only if they are kept; fused kernels recompute them.
    """
    if not shape.knows_activations:
        return 0, 0
    tokens = work.num_examples * work.num_sequences * work.length
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    size = 4 if work.mixed_precision == "no" else 2
    queries, keys = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
    mask = work.mask_bytes if shape.dropout else 0
    # Under autocast each projection casts its own copy of the input, and norms keep float32.
    casts = 0 if size == 4 else 2 * 2 * tokens * hidden
    if shape.is_gated:
        # The gate's and the up projection's outputs, the activation and the product; each norm keeps x and x / rms.
        feed_forward = 4 * tokens * intermediate * size
        norms = 2 * tokens * hidden * (4 + size) + 2 * tokens * hidden * size
    else:
        feed_forward = 2 * tokens * intermediate * size
        norms = 2 * tokens * hidden * 4 + 2 * tokens * hidden * size + 2 * tokens * hidden * mask
    attention = tokens * (2 * queries + 2 * keys) * size
    scores = count_block_scores(work.length) if work.skips_hidden_scores else work.length**2
    probabilities = work.num_examples * work.num_sequences * shape.num_heads * scores
    if work.keeps_attention:
        attention += probabilities * (size + (size + mask if mask else 0))
    layer = casts + norms + feed_forward + attention
    embeddings = tokens * hidden * (4 + mask)
    temporaries = max(2 * tokens * intermediate, 2 * probabilities if work.keeps_attention else 0) * size
    temporaries += 2 * tokens * hidden * 4
    if work.gradient_checkpointing:
        return shape.num_layers * tokens * hidden * 4 + embeddings, layer + temporaries
    if work.cuts_last_layer:
        return (shape.num_layers - 1) * layer + casts // 2 + tokens * 2 * keys * size + embeddings, temporaries
    return shape.num_layers * layer + embeddings, temporaries


def count_logits(shape: ModelShape, work: Work) -> tuple[int, int]:
    """Bytes that a language model's loss holds from the forward until the backward pass, and the most that it holds at once.

    The first is the gradient of the head's weights, which is made in the forward, and the hidden states of all targets with
    their gradients. To it come the logits of a chunk of tokens and their softmax in float32; under autocast also the head's
    outputs and their gradients in half precision, and a second gradient of the weights, of that chunk. A head that an adapter
    leaves frozen has none.
    """
    if not work.logit_tokens:
        return 0, 0
    of_weights = 4 * shape.embedding_parameters if work.trained_parameters is None else 0
    states = 2 * work.num_examples * work.num_sequences * work.length * shape.hidden_size * 4
    held = of_weights + states
    if work.mixed_precision == "no":
        return held, held + 8 * work.logit_tokens * shape.vocab_size
    return held, held + of_weights + 12 * work.logit_tokens * shape.vocab_size


def count_frozen(shape: ModelShape, work: Work) -> int:
    """Bytes of the weights beside an adapter on one process or under DDP; 0 without one."""
    if work.trained_parameters is None:
        return 0
    size = 2 if work.has_half_base else 4
    if not work.has_quantized_base:
        return size * (shape.num_parameters - work.trained_parameters)
    quantized = shape.num_layers * shape.layer_parameters
    return size * (shape.num_parameters - quantized) + math.ceil(_BYTES_PER_QUANTIZED * quantized)


def count_shards(strategy: Strategy, num_processes: int, num_local_processes: int) -> int:
    """Processes among which a strategy divides what it divides: all, or under HSDP those of a machine."""
    return num_local_processes if strategy.startswith("HSDP") else num_processes


def estimate_memory(shape: ModelShape, strategy: Strategy, work: Work, num_shards: int) -> MemoryEstimate:
    """Peak bytes on one device in a training step, after the first steps, which have no moments yet.

    Args:
        num_shards: as `count_shards`.

    Gradients grow as activations are freed, so with one micro-batch per step the peak holds the larger of the two; with
    several, the gradients of the first ones stay beside the activations of the next. ZeRO-2 and 3 always hold memory for
    their part of the gradients.
    """
    number = shape.num_parameters
    trained = number if work.trained_parameters is None else work.trained_parameters
    part, trained_part = -(-number // num_shards), -(-trained // num_shards)
    mixed = work.mixed_precision != "no"
    layers, copy, sent = 2 * shape.layer_parameters, 0, 0
    gathered = layers * (2 if mixed else 4)
    host = 0
    base = strategy.removesuffix(" offload")
    if base in ("one process", "DDP"):
        weights = 4 * trained + count_frozen(shape, work)
        gradients, optimizer = 4 * trained, 8 * trained
        # Autocast keeps a half-size copy of each weight that it has cast until the forward ends. Quantized ones it never sees.
        cast = trained if work.has_quantized_base else number - shape.embedding_parameters
        buffers = (4 * trained if base == "DDP" else 0) + (2 * cast if mixed else 0)
    elif base in ("FSDP2", "HSDP"):
        weights, gradients, optimizer = 4 * part, 4 * trained_part, 8 * trained_part
        buffers = gathered + shape.layer_parameters * 4 + 4 * shape.embedding_parameters
    else:
        size = 2 if mixed else 4
        accumulates = base == "ZeRO-1" and work.num_micro_batches > 1
        weights, gradients = size * number, size * (trained if accumulates else trained_part)
        # Of weights; under ZeRO-3 offload in float32 of gradients, which its optimizer has on the host.
        copy = 0 if strategy == "ZeRO-3" and not mixed else 4 * trained_part
        optimizer, buffers = 8 * trained_part, copy + size * count_bucket(int(base[-1]), number)
        if base == "ZeRO-3":
            weights = size * part
            # The engine puts gradients one behind the other before it sends them, when activations have been freed.
            sent = size * min(trained, max(count_bucket(3, number), shape.embedding_parameters))
            live = size * min(number, max(layers, count_live_parameters(number)))
            buffers += max(live, 4 * min(trained_part, SUB_GROUP))
    if strategy.endswith("offload"):
        # The optimizer and its master copy leave the device; with ZeRO-3 and FSDP so do weights and gradients.
        moved = optimizer + copy
        buffers -= copy
        optimizer = 0
        if base != "ZeRO-2":
            moved, weights, gradients = moved + weights + gradients, 0, 0
        host = moved
    activations, temporaries = count_activations(shape, work)
    held, of_logits = count_logits(shape, work)
    during = activations + max(temporaries + held, of_logits)
    # Of tied weights, the embeddings' gradient comes last, beside the head's, to which it is added.
    last = 4 * shape.embedding_parameters if shape.is_tied and work.trained_parameters is None else 0
    waits = work.num_micro_batches > 1 or base in ("ZeRO-2", "ZeRO-3")
    moving = gradients + max(during, sent) if waits else max(gradients + last, during)
    return MemoryEstimate(
        strategy, weights, gradients, optimizer, buffers, during, weights + optimizer + buffers + moving, host
    )


def count_checkpoint_bytes(shape: ModelShape, trained_parameters: int | None = None) -> int:
    """Bytes of a checkpoint: weights and two moments in float32; of an adapter, if `trained_parameters` is not None."""
    return 12 * (shape.num_parameters if trained_parameters is None else trained_parameters)


def divides_loading(strategy: Strategy, uses_dora: bool = False) -> bool:
    """Whether each process reads only its share of a model (training/models/shares.py). DoRA is made of whole weights."""
    return strategy.removesuffix(" offload") in ("FSDP2", "HSDP", "ZeRO-3") and not uses_dora


def count_loading_bytes(
    shape: ModelShape, strategy: Strategy, mixed_precision: str, num_local_processes: int, num_shards: int,
    uses_dora: bool = False,
) -> int:  # fmt: skip
    """Host bytes of a machine at a start, until the model is on the devices, in float32.

    Each process loads the whole model, or its share and one tensor at a time. In bf16 and fp16 DeepSpeed makes a copy of 2 bytes
    a parameter beside it.
    """
    copies = 2 if strategy.startswith("ZeRO") and mixed_precision != "no" else 0
    if not divides_loading(strategy, uses_dora):
        return (4 + copies) * shape.num_parameters * num_local_processes
    share = (4 + copies) * -(-shape.num_parameters // num_shards)
    return (share + 4 * max(shape.embedding_parameters, shape.layer_parameters)) * num_local_processes


def count_saving_bytes(
    shape: ModelShape, num_local_processes: int, num_processes: int, trained_parameters: int | None = None,
    in_pieces: bool = False,
) -> int:  # fmt: skip
    """Host bytes of a machine for the copy of a checkpoint that is being written: its processes' shares.

    Args:
        in_pieces: where the training lies in host memory, divided, each process keeps three pieces at most of its share.
    """
    share = count_checkpoint_bytes(shape, trained_parameters) * num_local_processes // num_processes
    if not in_pieces:
        return share
    return count_held_bytes(share, 4 * shape.embedding_parameters, num_local_processes)


def count_final_bytes(shape: ModelShape, trained_parameters: int | None = None) -> int:
    """Bytes of final/: the weights in float32; of an adapter, if `trained_parameters` is not None."""
    return 4 * (shape.num_parameters if trained_parameters is None else trained_parameters)


def fits(memory: MemoryEstimate, device_bytes: int, overhead_bytes: int = GPU_OVERHEAD_BYTES) -> bool:
    """Whether this fits a device, with the overhead of a process and some room for fragmentation."""
    return memory.peak + overhead_bytes <= device_bytes * USABLE_SHARE


def fits_host(memory: MemoryEstimate, num_local_processes: int, host_bytes: int) -> bool:
    """Whether a machine's memory holds what the processes on it offload."""
    return memory.host * num_local_processes <= host_bytes * USABLE_HOST_SHARE


def describe_host_need(memory: MemoryEstimate, num_local_processes: int, host_bytes: int) -> str:
    """How much of the machine's memory an offload needs, and what to do if there is less."""
    return (
        f"{memory.strategy} moves {memory.host * num_local_processes / GIB:.1f} GiB to the machine's own memory, but only "
        f"{host_bytes * USABLE_HOST_SHARE / GIB:.1f} GiB of it are usable: use more devices or nodes, or a smaller model"
    )


def largest_batch(
    shape: ModelShape,
    strategy: Strategy,
    work: Work,
    num_shards: int,
    device_bytes: int,
    overhead_bytes: int,
) -> int:
    """The largest per_device_batch_size that fits; 0 if not even one example does."""

    def fits_with(num_examples: int) -> bool:
        tried = replace(work, num_examples=num_examples)
        return fits(estimate_memory(shape, strategy, tried, num_shards), device_bytes, overhead_bytes)

    low, high = 0, _LARGEST_BATCH_TRIED
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits_with(middle) else (low, middle - 1)
    return low
