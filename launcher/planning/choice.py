"""Which topology suits this machine and this model, and why, in three lines.

A topology is one of accelerate_configs/*.yaml. What a YAML means is read from the YAML itself, so one of your own works
as well as those of the project. The choice: one process on one device; DDP if a device holds the whole model with its
optimizer; on several machines HSDP if the devices of one hold it together; else FSDP; ZeRO-3 with offload last.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onecurve.launcher.errors import UnreadableModel
from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.facts.recipes import predicts_tokens
from onecurve.launcher.facts.shape import ModelShape, load_shape
from onecurve.launcher.planning.data_estimate import count_sequences
from onecurve.launcher.planning.memory import (
    CPU_OVERHEAD_BYTES,
    GPU_OVERHEAD_BYTES,
    MemoryEstimate,
    Strategy,
    count_shards,
    describe_host_need,
    estimate_memory,
    fits,
    fits_host,
)
from onecurve.launcher.planning.topology import Topology, build_topology, refuse_hidden_gpus
from onecurve.launcher.planning.work import Work, build_work
from onecurve.launcher.units import GIB

if TYPE_CHECKING:
    from onecurve.training.config import Recipe


def count_processes(machine: Machine, num_processes: int | None) -> int:
    """Processes over all machines: as many as were asked for, else one per device."""
    num_machines = machine.node.num_nodes if machine.node is not None else 1
    return num_processes or max(1, len(machine.devices)) * num_machines


def list_candidates(
    kind: Literal["cuda", "mps", "cpu"], num_processes: int, num_machines: int
) -> tuple[tuple[Strategy, str], ...]:
    """Strategies to try on these devices, the simplest first, each with its YAML; `run` and `plan` choose from them.

    ZeRO-2 and ZeRO-3 are not included: FSDP2 needs less memory than both, and no extra package.
    """
    if kind == "cpu":
        return (("one process", "cpu"),) if num_processes == 1 else (("DDP", "multi_cpu"),)
    if num_processes == 1:
        offload: tuple[tuple[Strategy, str], ...] = (("ZeRO-3 offload", "deepspeed_zero3_offload"),)
        return (("one process", "single_gpu"), *(offload if kind == "cuda" else ()))
    hybrid: tuple[tuple[Strategy, str], ...] = (("HSDP", "hsdp"),) if 1 < num_machines < num_processes else ()
    return (
        ("DDP", "multi_node" if num_machines > 1 else "multi_gpu"),
        *hybrid,
        ("FSDP2", "fsdp"),
        ("ZeRO-3 offload", "deepspeed_zero3_offload"),
    )


def pick_topology(
    root: Path, machine: Machine, recipe: Recipe, name: str | None, num_processes: int | None
) -> Topology:
    """The topology of that name, or the simplest one in which the recipe fits.

    Raises:
        UnknownTopology, Unsuitable: as `choose_topology` and `build_topology`.
    """
    if name is not None:
        reasons = (f"found     {machine.describe()}", f"chosen    {name}", "because   --topology was given")
        return build_topology(root, machine, name, num_processes, reasons)
    try:
        shape = load_shape(recipe.model_name_or_path, predicts_tokens(recipe))
    except UnreadableModel:
        shape = None
    work = build_work(
        recipe,
        shape,
        machine.kind,
        recipe.max_length,
        count_processes(machine, num_processes),
        count_sequences(recipe),
    )
    return choose_topology(root, machine, shape, work, num_processes)


def choose_topology(
    root: Path, machine: Machine, shape: ModelShape | None, work: Work, num_processes: int | None = None
) -> Topology:
    """The simplest topology in which the training fits.

    Args:
        shape: the model's; None if its config.json is not on this machine.
        work: a micro-batch at the recipe's full length, with as many processes as `count_processes` says.

    Raises:
        UnknownTopology: the YAML of the choice is missing from accelerate_configs/.
        Unsuitable: as `build_topology`.
    """
    refuse_hidden_gpus(machine, num_processes)
    found = f"found     {machine.describe()}"
    num_machines = machine.node.num_nodes if machine.node is not None else 1
    num_devices = count_processes(machine, num_processes)
    candidates = list_candidates(machine.kind, num_devices, num_machines)
    if machine.kind == "cpu":
        strategy, name = candidates[0]
        reason = "no accelerator found; one process uses all cores" if num_devices == 1 else "DDP over gloo"
        if shape is not None:
            memory = estimate_memory(shape, strategy, work, num_devices)
            bound = "about" if shape.knows_activations else "without activations, which are unknown,"
            reason += f"; a step needs {bound} {(memory.peak + CPU_OVERHEAD_BYTES) / GIB:.1f} GiB"
        return build_topology(root, machine, name, num_processes, (found, f"chosen    {name}", f"because   {reason}"))
    smallest = min(device.memory_bytes for device in machine.devices)
    if shape is None or machine.kind == "mps":
        name, why = candidates[0][1], "the model's size is unknown; each device is assumed to hold all of it"
        if shape is not None:
            why = "one process, because Apple's GPU is a single device"
        return build_topology(root, machine, name, num_processes, (found, f"chosen    {name}", f"because   {why}"))
    tried: list[MemoryEstimate] = []
    num_local = max(1, num_devices // num_machines)
    for strategy, name in candidates:
        tried.append(estimate_memory(shape, strategy, work, count_shards(strategy, num_devices, num_local)))
        is_last = name == candidates[-1][1]
        if is_last or (fits(tried[-1], smallest) and fits_host(tried[-1], num_local, machine.memory_bytes)):
            break
    why = _explain(tried, smallest, num_local, machine.memory_bytes)
    lines = (found, f"chosen    {name} ({tried[-1].strategy})", f"because   {why}")
    return build_topology(root, machine, name, num_processes, lines)


def _explain(tried: list[MemoryEstimate], device_bytes: int, num_local: int, host_bytes: int) -> str:
    def needs(memory: MemoryEstimate) -> str:
        return f"{memory.strategy} needs {(memory.peak + GPU_OVERHEAD_BYTES) / GIB:.1f} GiB of {device_bytes / GIB:.0f}"

    if len(tried) == 1:
        return f"{needs(tried[0])} on each device, so no sharding is needed"
    verdict = "" if fits(tried[-1], device_bytes) else ", which is still too much: lower per_device_batch_size"
    if not fits_host(tried[-1], num_local, host_bytes):
        verdict += f"; {describe_host_need(tried[-1], num_local, host_bytes)}"
    return "; ".join(needs(memory) for memory in tried) + verdict
