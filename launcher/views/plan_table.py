"""Prints a plan as a table for people or as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onecurve.launcher.planning.data_estimate import DataEstimate
from onecurve.launcher.planning.plan import Plan
from onecurve.launcher.units import GIB, format_count, format_flops, format_gib, format_seconds
from onecurve.launcher.views.terminal import print_hanging

if TYPE_CHECKING:
    from rich.console import Console

    from onecurve.training.config import Recipe


_SECONDS_OF_NO_MATTER = 60.0


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as numbers: bytes, seconds, operations."""
    return {**asdict(plan), "device_hours": plan.device_hours}


def print_plan(console: Console, plan: Plan, recipe: Recipe) -> None:
    """Print one line per quantity, and a table with one row per strategy."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for name, value in describe_plan(plan, recipe):
        print_hanging(console, f"{name:<15}", value)
    console.print()
    table = Table(
        title=f"GiB on each of {plan.num_processes} devices, which have {plan.devices.memory_bytes / GIB:.0f}",
        caption="batch: largest per_device_batch_size that fits.  sent: by each device per step",
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
    advice = plan.recommended or "nothing fits: use more devices, gradient_checkpointing: true, or a smaller max_length"
    console.print(f"recommended    {advice}" + (f" ({host / GIB:.0f} GiB of host memory per process)" if host else ""))


def describe_plan(plan: Plan, recipe: Recipe) -> list[tuple[str, str]]:
    """Name and value of each quantity, for people to read."""
    shape, data = plan.shape, plan.data
    about = "" if shape.is_exact else "about "
    # With an uneven share some micro-batches of a step are not full.
    is_full = plan.micro_batch * plan.num_micro_batches * plan.num_processes == plan.train_batch_size
    lines = [
        (
            "model",
            f"{shape.model_type}, {about}{format_count(shape.num_parameters)} parameters, {shape.num_layers} layers of "
            f"{shape.hidden_size}",
        ),
        (
            "step",
            f"{plan.micro_batch} examples per micro-batch x {plan.num_micro_batches} accumulated x {plan.num_processes} "
            f"processes {'=' if is_full else '>='} {plan.train_batch_size} examples per step",
        ),
        (
            "data",
            f"{_describe_examples(data)}, {data.mean_length:.0f} tokens on average, {data.longest} at most, "
            f"{data.padding:.1%} padding ({data.source})",
        ),
    ]
    if data.doubt:
        lines.append(("about", f"{data.doubt}: onecurve check --deep prepares the data and counts its examples"))
    if plan.num_steps is not None:
        rounded = "about " if data.doubt else ""
        epoch = f" ({rounded}{plan.steps_per_epoch:,} per epoch)" if plan.steps_per_epoch else ""
        steps = f"{rounded if recipe.max_train_steps is None else ''}{plan.num_steps:,}{epoch}"
        lines.append(("steps", f"{steps}, {format_count(plan.tokens or 0)} tokens"))
    compute = f"{format_flops(plan.flops_per_step)} per step"
    if plan.flops is not None:
        compute += f", {format_flops(plan.flops)} in total"
    lines.append(("compute", compute))
    if plan.devices.kind == "cpu" and plan.devices.peak_float32 and plan.devices.peak_half:
        rates = (
            f"{1e3 * plan.devices.peak_float32:,.3g} GFLOP/s in float32, {1e3 * plan.devices.peak_half:,.3g} in bf16"
        )
        lines.append(("speed", f"{rates}, of a matrix product, measured on one core and multiplied by the cores"))
    lines.append(("time", _describe_time(plan)))
    if (
        plan.devices.kind == "cuda"
        and plan.mixed_precision == "no"
        and plan.devices.peak_float32
        and plan.devices.peak_half
    ):
        share = plan.devices.peak_half / plan.devices.peak_float32
        lines.append(("precision", f"float32, whose peak is {share:.0f} times below that of mixed_precision: bf16"))
    if not shape.knows_activations:
        lines.append(("memory", "of activations is unknown for this family: peak and batch below are without it"))
    loading = f"{format_gib(plan.loading_bytes)} of {format_gib(plan.host_bytes)} GiB of a node's memory"
    how = "reads its share of the model" if plan.divides_loading else "loads the whole model"
    lines.append(("loading", f"{loading}: each process {how}"))
    lines.append(
        ("files", f"{format_gib(plan.checkpoint_bytes)} GiB per checkpoint, {format_gib(plan.final_bytes)} GiB final/")
    )
    lines.append(("saving", f"{format_gib(plan.saving_bytes)} GiB of a node's memory, until a checkpoint is written"))
    return lines


def _describe_examples(data: DataEstimate) -> str:
    if data.num_examples is None:
        return "unknown examples"
    if not data.doubt:
        return f"{data.num_examples:,} examples"
    return f"about {data.num_examples:,} examples of {data.num_rows:,} rows"


def _describe_time(plan: Plan) -> str:
    if plan.seconds is not None and plan.device_hours is not None:
        # Of a short training the steps are the smallest part: what is left out takes longer.
        time = "under a minute" if plan.seconds < _SECONDS_OF_NO_MATTER else format_seconds(plan.seconds)
        hours = "under 0.01" if plan.device_hours < 0.01 else f"{plan.device_hours:,.2f}"
        return (
            f"{time} for the steps, at {plan.mfu:.0%} of peak, {hours} device-hours. Not in it: start-up (imports, tokenizing, "
            "loading: tens of seconds to minutes), evaluations, checkpoints, and communication that is not hidden"
        )
    if plan.flops is None:
        return "unknown, because the number of examples is not known"
    return "unknown, because this device's peak is not known: measure a few steps"
