"""A plan for people (a table) and for programs (JSON)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onecurve.launcher.planning.plan import Plan
from onecurve.launcher.units import GIB, format_count, format_flops, format_gib, format_seconds
from onecurve.launcher.views.terminal import print_hanging

if TYPE_CHECKING:
    from rich.console import Console

    from onecurve.training.config import Recipe


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain numbers: bytes, seconds, operations."""
    return {**asdict(plan), "device_hours": plan.device_hours}


def print_plan(console: Console, plan: Plan, recipe: Recipe) -> None:
    """The arithmetic, a line for each quantity, and a table with a row for each strategy."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for name, value in describe_plan(plan, recipe):
        print_hanging(console, f"{name:<15}", value)
    console.print()
    table = Table(
        title=f"GiB on each of {plan.num_processes} devices that have {plan.devices.memory_bytes / GIB:.0f}",
        caption="batch: largest per_device_batch_size that fits.  sent: by each device a step",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy", no_wrap=True)
    for heading in ("weights", "grads", "moments", "buffers", "activ.", "peak", "batch", "sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.strategies:
        memory = row.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.buffers, memory.activations, memory.peak)
        table.add_row(
            memory.strategy,
            *(format_gib(size) for size in parts),
            str(row.largest_batch) if row.largest_batch else "none",
            format_gib(row.communication_bytes),
            style="bold" if memory.strategy == plan.recommended else None if row.fits else "red",
        )
    console.print(table)
    host = next((row.memory.host for row in plan.strategies if row.memory.strategy == plan.recommended), 0)
    advice = plan.recommended or "nothing fits: more devices, gradient_checkpointing: true, or a smaller max_length"
    console.print(f"recommended    {advice}" + (f" ({host / GIB:.0f} GiB of the host's a process)" if host else ""))


def describe_plan(plan: Plan, recipe: Recipe) -> list[tuple[str, str]]:
    """Name and value of each quantity, for people."""
    shape, data = plan.shape, plan.data
    about = "" if shape.is_exact else "about "
    lines = [
        (
            "model",
            f"{shape.model_type}, {about}{format_count(shape.num_parameters)} parameters, {shape.num_layers} layers of "
            f"{shape.hidden_size}",
        ),
        (
            "step",
            f"{plan.micro_batch} examples a micro-batch x {plan.num_micro_batches} accumulated x {plan.num_processes} "
            f"processes >= {plan.train_batch_size} examples a step"
            if plan.micro_batch * plan.num_micro_batches * plan.num_processes != plan.train_batch_size
            else f"{plan.micro_batch} examples a micro-batch x {plan.num_micro_batches} accumulated x {plan.num_processes} "
            f"processes = {plan.train_batch_size} examples a step",
        ),
        (
            "data",
            f"{'unknown' if data.num_examples is None else f'{data.num_examples:,}'} examples, {data.mean_length:.0f} tokens "
            f"on average, {data.longest} at most, {data.padding:.1%} padding ({data.source})",
        ),
    ]
    if plan.num_steps is not None:
        epoch = f" ({plan.steps_per_epoch:,} an epoch)" if plan.steps_per_epoch else ""
        lines.append(("steps", f"{plan.num_steps:,}{epoch}, {format_count(plan.tokens or 0)} tokens"))
    compute = f"{format_flops(plan.flops_per_step)} a step"
    if plan.flops is not None:
        compute += f", {format_flops(plan.flops)} in all"
    lines.append(("compute", compute))
    if plan.seconds is not None and plan.device_hours is not None:
        lines.append(
            (
                "time",
                f"{format_seconds(plan.seconds)} at {plan.mfu:.0%} of peak, {plan.device_hours:.2f} device-hours; "
                "evaluation, loading and visible communication come on top",
            )
        )
    else:
        lines.append(("time", "unknown: neither this device's peak nor the number of examples can be guessed"
                      if plan.flops is None else "unknown for this device: measure a few steps"))  # fmt: skip
    lines.append(
        ("files", f"{format_gib(plan.checkpoint_bytes)} GiB a checkpoint, {format_gib(plan.final_bytes)} GiB final/")
    )
    return lines
