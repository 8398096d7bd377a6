"""What dropout by example costs, or where it can't be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.planning.data_estimate import count_sequences
from onecurve.launcher.planning.topology import Topology
from onecurve.launcher.planning.work import build_work, loses_fused_kernel
from onecurve.launcher.preflight.findings import Finding, warning
from onecurve.launcher.units import MIB

if TYPE_CHECKING:
    from onecurve.training.config import Recipe


def check_dropout(recipe: Recipe, topology: Topology, shape: ModelShape) -> list[Finding]:
    """Whether attention with dropout loses its fused kernel on a GPU, and whether a kernel draws masks of its own."""
    dropout = shape.dropout if recipe.dropout is None else recipe.dropout
    if topology.uses_cpu or dropout == 0 or recipe.dropout_masks != "by_example":
        return []
    if recipe.attn_implementation not in (None, "eager", "sdpa"):
        return [
            warning(
                f"dropout_masks: {recipe.attn_implementation} draws its own masks, so curves of other topologies agree "
                "statistically only; remove attn_implementation to have them by example"
            )
        ]
    if not loses_fused_kernel(recipe, dropout):
        return []
    num_sequences = count_sequences(recipe)
    work = build_work(recipe, shape, "cuda", recipe.max_length, topology.num_processes, num_sequences)
    size = 4 if work.mixed_precision == "no" else 2
    entries = shape.num_layers * work.num_examples * num_sequences * shape.num_heads * work.length**2
    return [
        warning(
            f"dropout_masks: attention drops {dropout:g} of its weights by example, for which it keeps them: up to "
            f"{entries * (2 * size + 1) / MIB:,.0f} MiB, and no fused kernel; dropout_masks: torch has the kernel, but "
            "other topologies then agree statistically only"
        )
    ]
