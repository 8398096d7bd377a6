"""Whether bf16 is fast enough on the processor that a recipe would train on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onecurve.launcher.facts import product_rates
from onecurve.launcher.planning.topology import Topology
from onecurve.launcher.preflight.findings import Finding, error, warning

if TYPE_CHECKING:
    from onecurve.training.config import Recipe


def check_bf16_speed(recipe: Recipe, topology: Topology) -> tuple[list[str], list[Finding]]:
    """Measure bf16 beside float32, if it is asked for on a CPU.

    Returns:
        A fact with the ratio, and the problem where bf16 is slower: an error beyond what a training accepts, unless the
        recipe allows it.
    """
    if recipe.mixed_precision != "bf16" or not topology.uses_cpu:
        return [], []
    rates = product_rates.measure_product_rates()
    if rates is None:
        return [], [warning("mixed_precision: the speed of bf16 could not be measured, because PyTorch does not start")]
    problem = rates.find_problem()
    if problem is not None and not recipe.allow_slow_bf16:
        return [], [error(problem)]
    if rates.slowdown > 1:
        return [], [warning(f"mixed_precision: {rates.describe()}")]
    return [f"precision {rates.describe()}"], []
