"""The micro-batch of a recipe on one process, in the numbers that memory depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from onecurve.launcher.facts.shape import ModelShape
from onecurve.training.architectures import choose_chunk_tokens

if TYPE_CHECKING:
    from onecurve.training.config import Recipe


@dataclass(frozen=True)
class Work:
    """What goes through the model at once on one process.

    Attributes:
        num_examples: examples of a micro-batch.
        num_sequences: of an example, such as choices; `length` is that of each.
        length: padded tokens of each.
        num_micro_batches: of one step on one process; with several, gradients stay in memory while later ones are computed.
        mixed_precision: the recipe's.
        gradient_checkpointing: the recipe's.
        keeps_attention: whether attention probabilities are kept: eager attention, any with dropout by example, and on a CPU any
            with dropout or in bf16.
        skips_hidden_scores: whether of those only what a block of queries sees is computed (training/models/causal_matrices.py).
        mask_bytes: of each entry of a dropout mask: 1, or on a CPU 4 with torch's own dropout, which keeps the noise.
        logit_tokens: tokens whose logits over a vocabulary are in memory at once (training/tasks/chunked_losses.py).
        trained_parameters: of an adapter; None where all of the model's are trained.
        has_half_base: whether the weights beside an adapter have two bytes each.
        has_quantized_base: whether the linear layers beside an adapter have four bits a weight.
        cuts_last_layer: whether the last layer computes the first token only (training/models/last_layer.py).
    """

    num_examples: int
    length: int
    num_sequences: int = 1
    num_micro_batches: int = 1
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    keeps_attention: bool = False
    skips_hidden_scores: bool = False
    mask_bytes: int = 1
    cuts_last_layer: bool = False
    logit_tokens: int = 0
    trained_parameters: int | None = None
    has_half_base: bool = False
    has_quantized_base: bool = False


def build_work(
    recipe: Recipe,
    shape: ModelShape | None,
    kind: Literal["cuda", "mps", "cpu"],
    length: int,
    num_processes: int,
    num_sequences: int = 1,
) -> Work:
    """A micro-batch of the recipe with examples of some sequences of `length` padded tokens, on one of `num_processes`."""
    share = math.ceil(recipe.train_batch_size / num_processes)
    micro_batch = min(share, recipe.per_device_batch_size)
    if recipe.per_device_batch_tokens is not None:
        micro_batch = max(1, min(micro_batch, recipe.per_device_batch_tokens // (num_sequences * length)))
    dropout = recipe.dropout if recipe.dropout is not None else (shape.dropout if shape is not None else 0.0)
    is_by_example = recipe.dropout_masks == "by_example"
    keeps_attention = recipe.attn_implementation == "eager" or (kind == "cpu" and dropout > 0)
    keeps_attention |= loses_fused_kernel(recipe, dropout)
    # There training/models/example_dropout.py exchanges the attention.
    takes_matrices = kind == "cpu" and is_by_example and recipe.mixed_precision == "bf16"
    takes_matrices &= recipe.attn_implementation is None and not recipe.torch_compile
    return Work(
        num_examples=micro_batch,
        length=length,
        num_sequences=num_sequences,
        num_micro_batches=math.ceil(share / micro_batch),
        mixed_precision=recipe.mixed_precision,
        gradient_checkpointing=recipe.gradient_checkpointing,
        keeps_attention=keeps_attention or takes_matrices,
        skips_hidden_scores=takes_matrices and dropout == 0 and shape is not None and shape.is_decoder,
        mask_bytes=0 if dropout == 0 else 4 if kind == "cpu" and not is_by_example else 1,
        logit_tokens=0
        if shape is None or not shape.predicts_tokens
        else min(micro_batch * num_sequences * length, choose_chunk_tokens(recipe.loss_chunk_tokens, shape.vocab_size)),
        trained_parameters=None if shape is None else count_trained_parameters(recipe, shape),
        has_half_base=recipe.base_dtype == "bfloat16",
        has_quantized_base=recipe.quantization == "nf4",
        cuts_last_layer=shape is not None
        and shape.reads_first_token
        and recipe.attn_implementation in (None, "eager", "sdpa"),
    )


def loses_fused_kernel(recipe: Recipe, dropout: float) -> bool:
    """Whether masks by example take SDPA's fused kernel from the attention: it draws its own.

    Args:
        dropout: of attention probabilities.
    """
    return recipe.dropout_masks == "by_example" and dropout > 0 and recipe.attn_implementation in (None, "sdpa")


# By the matrices of a layer: what families call them.
_NAMES = {
    "query": ("q_proj", "query", "q_lin", "q"),
    "key": ("k_proj", "key", "k_lin", "k"),
    "value": ("v_proj", "value", "v_lin", "v"),
    "output": ("o_proj", "out_lin", "out_proj", "o"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "lin1", "fc1", "c_fc", "wi"),
    "down": ("down_proj", "lin2", "fc2", "wo"),
}


def count_trained_parameters(recipe: Recipe, shape: ModelShape) -> int | None:
    """Parameters of the recipe's adapter, without a new head, which has few; None without an adapter.

    LoRA has r x (inputs + outputs) for each matrix (Hu et al. 2021), DoRA as many as outputs more. Of layers that have other
    names than `_NAMES`, as GPT-2's, all linear ones are counted.
    """
    if recipe.adapter == "none":
        return None
    hidden, feed_forward = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
    sizes = {"query": (hidden, queries), "key": (hidden, keys), "value": (hidden, keys), "output": (queries, hidden),
             "up": (hidden, feed_forward), "down": (feed_forward, hidden),
             **({"gate": (hidden, feed_forward)} if shape.is_gated else {})}  # fmt: skip
    named = {key for key in sizes if not set(recipe.lora_target_modules).isdisjoint(_NAMES[key])}
    chosen = [sizes[key] for key in (named if named and recipe.lora_target_modules != "all-linear" else sizes)]
    if not feed_forward:  # A family whose layers are not known: as if its matrices were square.
        chosen = [(hidden, hidden)] * (shape.layer_parameters // hidden**2)
    return shape.num_layers * sum(
        recipe.lora_r * (inputs + outputs) + (outputs if recipe.use_dora else 0) for inputs, outputs in chosen
    )
