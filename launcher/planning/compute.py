"""Operations of a training step, and the bytes that its devices exchange."""

from __future__ import annotations

from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.planning.memory import Strategy


def count_flops(shape: ModelShape, num_tokens: float, length: float, gradient_checkpointing: bool = False) -> float:
    """Operations of forward and backward over `num_tokens` tokens in sequences of `length`.

    6 for each parameter in a matrix product that a token goes through, and 12 x layers x hidden x length for each token's
    attention (Chowdhery et al. 2022, "PaLM", appendix B; half of the latter for a decoder's triangle). Recomputing the forward
    costs a third more (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"); a language model's head is not
    computed again, and is counted for every token, although only targets need it.
    """
    in_products = shape.num_layers * (shape.layer_parameters - shape.idle_parameters)
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_size * length * (0.5 if shape.is_decoder else 1)
    head = 6 * shape.embedding_parameters if shape.predicts_tokens else 0
    return ((6 * in_products + attention) * (4 / 3 if gradient_checkpointing else 1) + head) * num_tokens


def count_communication(
    strategy: Strategy, shape: ModelShape, num_processes: int, num_micro_batches: int, mixed_precision: str,
    num_replicas: int = 1,
) -> int:  # fmt: skip
    """Bytes that each device sends in one step.

    A ring moves (P-1)/P of the data for a gather or a reduce-scatter and twice that for an all-reduce (Patarasuk and
    Yuan 2009). DDP all-reduces the gradients once per step. ZeRO-1 and 2 reduce-scatter gradients and gather weights: the
    same volume. ZeRO-3 and FSDP gather the weights twice for each micro-batch and scatter gradients: 1.5 times the volume
    (Rajbhandari et al. 2020, section 7). HSDP does so inside each of its groups, and all-reduces each process's part of the
    gradients between them.

    Args:
        num_replicas: groups of HSDP.
    """
    if num_processes == 1:
        return 0
    num_shards = num_processes // num_replicas
    ring = (num_shards - 1) / num_shards
    base = strategy.removesuffix(" offload")
    size = 4 if mixed_precision == "no" or base == "DDP" else 2
    if base in ("one process", "DDP", "ZeRO-1", "ZeRO-2"):
        return int(2 * ring * size * shape.num_parameters)
    # FSDP reduces gradients in float32 and only at the step's last micro-batch; ZeRO-3 reduces each time.
    reduces = 4 if base in ("FSDP2", "HSDP") else size * num_micro_batches
    between = 2 * (num_replicas - 1) / num_replicas * 4 / num_shards
    return int(shape.num_parameters * (ring * (2 * size * num_micro_batches + reduces) + between))
