"""Devices and processes: enough memory, free devices, a suitable number of processes, and a port to connect on."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from onecurve.launcher.facts.machine import DEFAULT_PORT, Machine
from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.launching.command import choose_port, is_port_free
from onecurve.launcher.planning.configs import read_yaml
from onecurve.launcher.planning.data_estimate import count_sequences
from onecurve.launcher.planning.devices import describe_devices
from onecurve.launcher.planning.memory import (
    CPU_OVERHEAD_BYTES,
    GPU_OVERHEAD_BYTES,
    USABLE_HOST_SHARE,
    USABLE_SHARE,
    count_loading_bytes,
    describe_host_need,
    divides_loading,
    estimate_memory,
    fits,
    fits_host,
    largest_batch,
)
from onecurve.launcher.planning.topology import Topology, describe_driver_problem
from onecurve.launcher.planning.work import build_work
from onecurve.launcher.preflight.findings import Finding, error, warning
from onecurve.launcher.units import GIB

if TYPE_CHECKING:
    from onecurve.training.config import Recipe

# A launch sets these for its processes; another launch must not inherit them.
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
# They override what the training sets itself.
_OVERRULING_VARIABLES = ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION")


def check_memory(recipe: Recipe, topology: Topology, machine: Machine, shape: ModelShape) -> list[Finding]:
    """Whether a step fits on a device, estimated by launcher/planning/memory.py."""
    num_sequences = count_sequences(recipe)
    work = build_work(recipe, shape, machine.kind, recipe.max_length, topology.num_processes, num_sequences)
    memory = estimate_memory(shape, topology.strategy, work, topology.num_shards)
    here = topology.num_local_processes
    findings = []
    strategy, num_shards = topology.strategy, topology.num_shards
    loading = count_loading_bytes(shape, strategy, recipe.mixed_precision, here, num_shards, recipe.use_dora)
    if loading > machine.memory_bytes * USABLE_HOST_SHARE:
        what = (
            "read their shares of the model"
            if divides_loading(strategy, recipe.use_dora)
            else "load the whole model each"
        )
        findings.append(
            warning(
                f"memory: {here} processes {what}, {loading / GIB:.1f} GiB together, but this machine has "
                f"{machine.memory_bytes / GIB:.1f}; use fewer processes on each machine, or a machine with more memory"
            )
        )
    if machine.kind == "cuda" and not topology.uses_cpu:
        device, overhead = min(device.memory_bytes for device in machine.devices), GPU_OVERHEAD_BYTES
        if not fits_host(memory, here, machine.memory_bytes):
            findings.append(warning(f"memory: {describe_host_need(memory, here, machine.memory_bytes)}"))
    else:
        # What is offloaded to the host takes the same memory.
        device, overhead = max(0, machine.memory_bytes // here - memory.host), CPU_OVERHEAD_BYTES
    if fits(memory, device, overhead):
        return findings
    best = largest_batch(shape, topology.strategy, work, topology.num_shards, device, overhead)
    advice = (
        f"lower per_device_batch_size to {best}, which does not change results, or"
        if best
        else "not even one example fits: use a sharded --topology (fsdp, deepspeed_zero3), more devices, or"
    )
    length = f"{num_sequences} x {work.length}" if num_sequences > 1 else str(work.length)
    need = (memory.peak + overhead) / GIB
    bound = "about" if shape.knows_activations else "without activations, which are unknown,"
    room = device * USABLE_SHARE / GIB
    return [
        *findings,
        warning(
            f"memory: {topology.strategy} with {work.num_examples} examples of {length} tokens needs {bound} {need:.1f} "
            f"GiB of {room:.1f} usable on each device; {advice} set gradient_checkpointing: true"
        ),
    ]


def check_processes(recipe: Recipe, topology: Topology, machine: Machine) -> list[Finding]:
    """Whether the number of processes fits the recipe, the cores and the nodes, and the precision fits the devices."""
    findings = []
    if topology.num_processes > recipe.train_batch_size:
        findings.append(
            warning(
                f"train_batch_size {recipe.train_batch_size} is less than {topology.num_processes} processes: "
                "some are idle in each step; use fewer processes"
            )
        )
    if topology.num_processes % topology.num_machines:
        findings.append(
            error(
                f"world size: {topology.num_processes} processes can't be divided evenly among {topology.num_machines} "
                f"nodes; use a multiple of {topology.num_machines}"
            )
        )
    here = topology.num_local_processes
    if here > machine.num_cores:
        findings.append(
            warning(f"{here} processes share {machine.num_cores} cores and slow each other down; use fewer")
        )
    if recipe.mixed_precision == "fp16" and (topology.uses_cpu or machine.kind == "cpu"):
        findings.append(error("mixed_precision: fp16 needs a GPU; use bf16 or no"))
    if recipe.mixed_precision == "bf16" and machine.kind == "cuda" and not topology.uses_cpu:
        oldest = min(device.compute_capability for device in machine.devices)
        if 0 < oldest < 8:
            findings.append(
                error(f"mixed_precision: compute capability {oldest} has no bf16 (8.0 and newer have); use fp16 or no")
            )
    if recipe.mixed_precision == "no" and machine.kind == "cuda" and not topology.uses_cpu:
        findings += _check_float32(machine)
    return findings


def _check_float32(machine: Machine) -> list[Finding]:
    """What float32 gives away on GPUs that have bf16."""
    devices = describe_devices(machine)
    if min(device.compute_capability for device in machine.devices) < 8:
        return []
    peaks = devices.peak_float32, devices.peak_half
    share = f" {peaks[1] / peaks[0]:.0f} times" if peaks[0] and peaks[1] else " many times"
    return [
        warning(
            f"mixed_precision: no computes in float32, whose peak on {devices.name} is{share} below bf16's; "
            "set mixed_precision: bf16 unless you need float32's digits"
        )
    ]


def check_launch(topology: Topology, machine: Machine) -> list[Finding]:
    """Whether another launch's variables or the YAML would start a wrong number of processes, and whether their port is free."""
    findings = check_affinity(machine) + check_variables()
    inherited = [name for name in _LAUNCH_VARIABLES if name in os.environ]
    if inherited and os.environ.get("WORLD_SIZE") != "1" and not topology.is_distributed:
        shown = ", ".join(f"${name} is {os.environ[name]}" for name in inherited)
        findings.append(
            error(
                f"world size: {shown}, left by another launch; one process would wait forever for the others: "
                f"unset {' '.join(inherited)}"
            )
        )
    num_meant = read_yaml(topology.path).get("num_machines", 1)
    if topology.num_machines == 1 and isinstance(num_meant, int) and num_meant > 1:
        findings.append(
            warning(
                f"world size: {topology.path.name} is for {num_meant} machines, but this is a launch on one; in a Slurm "
                "job start it on every node: srun --ntasks-per-node=1 onecurve run ..."
            )
        )
    if topology.num_machines > 1 and topology.machine_rank == 0:
        port = choose_port(machine, topology)
        if not is_port_free(port):
            findings.append(
                error(f"port {port}, which this job's nodes need, is in use on the first node; submit it again")
            )
    return findings


def check_devices(machine: Machine, num_used: int) -> list[Finding]:
    """Whether the driver works, and whether other processes hold memory of the first `num_used` GPUs."""
    if machine.driver_problem is not None:
        return [error(describe_driver_problem(machine.driver_problem))]
    return [
        warning(
            f"GPU {device.index}: {device.used_bytes / GIB:.1f} of {device.memory_bytes / GIB:.0f} GiB are used by "
            "other processes (nvidia-smi lists them)"
        )
        for device in machine.devices[:num_used]
        if device.used_bytes >= device.memory_bytes * 0.1
    ]


def check_port() -> list[Finding]:
    """Whether the default port of `accelerate launch` is free."""
    if is_port_free(DEFAULT_PORT):
        return []
    return [
        warning(
            f"port {DEFAULT_PORT} is in use; onecurve run uses another, but accelerate launch needs --main_process_port"
        )
    ]


def check_affinity(machine: Machine) -> list[Finding]:
    """Whether this process may use only a small part of the cores that Slurm granted, or that the machine has."""
    granted = machine.node.num_cpus if machine.node is not None else 0
    num_cores = min(granted or sys.maxsize, os.cpu_count() or 1)
    if machine.num_cores * 4 > num_cores:
        return []
    return [
        warning(
            f"this process may use only {machine.num_cores} of {num_cores} cores: check its CPU affinity and its limits"
        )
    ]


def check_variables() -> list[Finding]:
    """Variables that override the recipe."""
    return [
        warning(f"${name} is set and overrides the recipe: unset {name}")
        for name in _OVERRULING_VARIABLES
        if name in os.environ
    ]
