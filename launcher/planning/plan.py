"""`onecurve plan`: the arithmetic of a training before it runs: batches, steps, memory, compute, communication, time, files.

Nothing is measured here and no device is needed. Formulas and their sources stand at the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.planning.choice import list_candidates
from onecurve.launcher.planning.compute import count_communication, count_flops
from onecurve.launcher.planning.data_estimate import DataEstimate, count_recipe_steps
from onecurve.launcher.planning.devices import Cluster, DeviceKind
from onecurve.launcher.planning.memory import (
    CPU_OVERHEAD_BYTES,
    GPU_OVERHEAD_BYTES,
    STRATEGIES,
    MemoryEstimate,
    Strategy,
    count_checkpoint_bytes,
    count_final_bytes,
    count_loading_bytes,
    count_saving_bytes,
    count_shards,
    divides_loading,
    estimate_memory,
    fits,
    fits_host,
    largest_batch,
)
from onecurve.launcher.planning.work import Work, build_work

if TYPE_CHECKING:
    from onecurve.training.config import Recipe


@dataclass(frozen=True)
class StrategyPlan:
    """One strategy on the devices that were asked about.

    Attributes:
        fits: on the device, and on the host if the strategy offloads to it.
        largest_batch: the largest per_device_batch_size that fits.
        communication_bytes: sent by each device in one step.
    """

    memory: MemoryEstimate
    fits: bool
    largest_batch: int
    communication_bytes: int


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one recipe on one set of devices."""

    shape: ModelShape
    data: DataEstimate
    devices: DeviceKind
    num_nodes: int
    num_processes: int
    micro_batch: int
    num_micro_batches: int
    train_batch_size: int
    num_steps: int | None
    steps_per_epoch: int | None
    tokens: int | None
    flops_per_step: float
    flops: float | None
    mfu: float
    seconds: float | None
    mixed_precision: str
    loading_bytes: int
    divides_loading: bool
    saving_bytes: int
    host_bytes: int
    checkpoint_bytes: int
    final_bytes: int
    strategies: tuple[StrategyPlan, ...]
    recommended: str | None

    @property
    def device_hours(self) -> float | None:
        """Hours times devices."""
        return None if self.seconds is None else self.seconds * self.num_processes / 3600


def build_plan(recipe: Recipe, shape: ModelShape, data: DataEstimate, cluster: Cluster) -> Plan:
    """Compute everything that `onecurve plan` shows."""
    devices, num_nodes, mfu = cluster.devices, cluster.num_nodes, cluster.mfu
    num_processes = devices.count * num_nodes
    work = build_work(recipe, shape, devices.kind, recipe.max_length, num_processes, data.most_sequences)
    steps_per_epoch, num_steps = count_recipe_steps(recipe, data.num_examples)
    padded_length = data.mean_length / (1 - data.padding)
    flops_per_step = count_flops(
        shape,
        recipe.train_batch_size * padded_length,
        padded_length / data.mean_sequences,
        recipe.gradient_checkpointing,
    )
    flops = None if num_steps is None else flops_per_step * num_steps
    peak = devices.teraflops(recipe.mixed_precision)
    seconds = None if flops is None or peak is None else flops / (peak * 1e12 * mfu * num_processes)
    strategies = _plan_strategies(shape, work, cluster)
    recommended = _recommend(strategies, list_candidates(devices.kind, num_processes, num_nodes))
    loads_as, trained = recommended or "DDP", work.trained_parameters
    return Plan(
        shape=shape,
        data=data,
        devices=devices,
        num_nodes=num_nodes,
        num_processes=num_processes,
        micro_batch=work.num_examples,
        num_micro_batches=work.num_micro_batches,
        train_batch_size=recipe.train_batch_size,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        tokens=None if num_steps is None else int(num_steps * recipe.train_batch_size * data.mean_length),
        flops_per_step=flops_per_step,
        flops=flops,
        mfu=mfu,
        seconds=seconds,
        mixed_precision=recipe.mixed_precision,
        loading_bytes=count_loading_bytes(
            shape,
            loads_as,
            recipe.mixed_precision,
            devices.count,
            count_shards(loads_as, num_processes, devices.count),
            recipe.use_dora,
        ),
        divides_loading=divides_loading(loads_as, recipe.use_dora),
        saving_bytes=count_saving_bytes(
            shape,
            devices.count,
            num_processes,
            trained,
            in_pieces=loads_as == "FSDP2 offload" or (devices.kind == "cpu" and divides_loading(loads_as)),
        ),
        host_bytes=cluster.host_bytes,
        checkpoint_bytes=count_checkpoint_bytes(shape, work.trained_parameters),
        final_bytes=count_final_bytes(shape, work.trained_parameters),
        strategies=tuple(strategies),
        recommended=recommended,
    )


def _plan_strategies(shape: ModelShape, work: Work, cluster: Cluster) -> list[StrategyPlan]:
    """What each strategy that suits the number of processes needs, and whether it fits."""
    devices = cluster.devices
    num_processes = devices.count * cluster.num_nodes
    overhead = CPU_OVERHEAD_BYTES if devices.kind == "cpu" else GPU_OVERHEAD_BYTES
    plans = []
    hybrid: tuple[Strategy, ...] = ("HSDP",) if 1 < cluster.num_nodes < num_processes else ()
    for strategy in (*STRATEGIES, *hybrid):
        if (strategy == "one process") != (num_processes == 1) and not (num_processes == 1 and "offload" in strategy):
            continue
        num_shards = count_shards(strategy, num_processes, devices.count)
        memory = estimate_memory(shape, strategy, work, num_shards)
        on_host = fits_host(memory, devices.count, cluster.host_bytes)
        plans.append(
            StrategyPlan(
                memory,
                fits(memory, devices.memory_bytes, overhead) and on_host,
                largest_batch(shape, strategy, work, num_shards, devices.memory_bytes, overhead) if on_host else 0,
                count_communication(
                    strategy,
                    shape,
                    num_processes,
                    work.num_micro_batches,
                    work.mixed_precision,
                    num_processes // num_shards,
                ),
            )
        )
    return plans


def _recommend(strategies: Sequence[StrategyPlan], candidates: Sequence[tuple[Strategy, str]]) -> Strategy | None:
    """The first candidate of `run` that fits."""
    fitting = {plan.memory.strategy for plan in strategies if plan.fits}
    return next((strategy for strategy, _ in candidates if strategy in fitting), None)
