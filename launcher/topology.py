"""Which topology suits this machine and this model, and why, in three lines.

A topology is one of accelerate_configs/*.yaml. What a YAML means is read from the YAML itself, so one of your own works
as well as those that come with the project. The choice: one process where there is one device; DDP where a device holds
the whole model with its optimizer; FSDP where it does not; ZeRO-3 with offload last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import UnknownTopology, Unsuitable
from launcher.machine import GIB, Machine
from launcher.memory import CPU_OVERHEAD_BYTES, GPU_OVERHEAD_BYTES, MemoryPlan, Strategy, Work, fits, plan_memory
from launcher.shape import ModelShape


@dataclass(frozen=True)
class Topology:
    """How many processes, where, with which strategy, and why.

    Attributes:
        name: of the YAML, without its suffix.
        path: the YAML.
        strategy: what the YAML makes accelerate do.
        uses_cpu: the YAML keeps a training off any GPU.
        num_processes: over all machines.
        reasons: lines for people: what was found, what was chosen, why.
    """

    name: str
    path: Path
    strategy: Strategy
    uses_cpu: bool
    num_processes: int
    num_machines: int = 1
    machine_rank: int = 0
    head_address: str | None = None
    reasons: tuple[str, ...] = ()

    @property
    def num_local_processes(self) -> int:
        """Processes on each machine."""
        return max(1, self.num_processes // self.num_machines)

    @property
    def is_distributed(self) -> bool:
        """Whether accelerate starts it through torch's elastic agent, which needs a port."""
        return self.strategy != "one process"


def find_configs(root: Path) -> dict[str, Path]:
    """The accelerate YAMLs that come with the project, by name."""
    return {path.stem: path for path in sorted((root / "accelerate_configs").glob("*.yaml"))}


def read_yaml(path: Path) -> dict[str, Any]:
    """An accelerate YAML as it stands.

    Raises:
        UnknownTopology: it can't be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UnknownTopology(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UnknownTopology(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UnknownTopology(f"{path}: must be a mapping of accelerate's keys to values")
    return content


def resolve_config(root: Path, name: str) -> Path:
    """The YAML that `--topology` names: one of the project's, or a path.

    Raises:
        UnknownTopology: there is none; the message lists the valid names.
    """
    configs = find_configs(root)
    if name in configs:
        return configs[name]
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    from training.config import find_nearest

    nearest = find_nearest(name, list(configs))
    hint = f"did you mean {nearest}? " if nearest else ""
    raise UnknownTopology(f"--topology {name}: unknown; {hint}There are: {', '.join(configs)}, or the path of a YAML")


def read_strategy(content: Mapping[str, Any]) -> Strategy:
    """The strategy that an accelerate YAML makes accelerate use."""
    kind = str(content.get("distributed_type", "NO")).upper()
    nested = content.get("deepspeed_config") or content.get("fsdp_config") or {}
    if kind == "DEEPSPEED":
        stage = nested.get("zero_stage", 2)
        moved = {nested.get("offload_optimizer_device"), nested.get("offload_param_device")} & {"cpu", "nvme"}
        strategies: dict[int, tuple[Strategy, Strategy]] = {
            1: ("ZeRO-1", "ZeRO-1"), 2: ("ZeRO-2", "ZeRO-2 offload"), 3: ("ZeRO-3", "ZeRO-3 offload")
        }  # fmt: skip
        plain, offloaded = strategies.get(stage, ("DDP", "DDP"))
        return offloaded if moved else plain
    if kind == "FSDP":
        moved_to_host = nested.get("fsdp_offload_params", nested.get("offload_params"))
        return "FSDP2 offload" if moved_to_host else "FSDP2"
    return "one process" if kind == "NO" else "DDP"


def build_topology(
    root: Path, machine: Machine, name: str, num_processes: int | None, reasons: tuple[str, ...] = ()
) -> Topology:
    """The topology of one YAML on this machine; `num_processes` beats what the machine and the YAML suggest.

    Raises:
        UnknownTopology: no such YAML.
        Unsuitable: more processes asked for than one process by nature can be, or than there are GPUs; or Slurm's nodes
            don't fit it.
    """
    path = resolve_config(root, name)
    content = read_yaml(path)
    strategy = read_strategy(content)
    slurm = machine.slurm
    num_machines = slurm.num_nodes if slurm is not None else 1
    if slurm is not None and slurm.num_nodes > 1 and slurm.is_batch_shell:
        raise Unsuitable(
            f"this is the batch shell of a job on {slurm.num_nodes} nodes, where only the first would train; start it on "
            "every node: srun --ntasks-per-node=1 onecurve run ..."
        )
    uses_cpu = bool(content.get("use_cpu", False))
    if not uses_cpu:
        _refuse_hidden_gpus(machine, num_processes)
    if slurm is not None and slurm.num_nodes > 1 and strategy == "one process":
        raise Unsuitable(
            f"{path.name} is one process, and this job has {slurm.num_nodes} nodes, each of which would train the same "
            "model alone; ask for one node, or take multi_cpu or multi_node"
        )
    if strategy == "one process":
        if num_processes not in (None, 1):
            raise Unsuitable(
                f"--num_processes {num_processes}: {path.name} is one process; take multi_cpu or multi_gpu"
            )
        chosen = 1
    elif num_processes is not None:
        chosen = num_processes
    elif machine.kind == "cuda" and not uses_cpu:
        chosen = len(machine.devices) * num_machines
    else:
        # No GPU: a rehearsal over gloo. The YAML of a CPU topology says how many; others name a cluster's size.
        chosen = int(content.get("num_processes", 2)) if uses_cpu else 2
        if num_machines > 1:
            chosen = num_machines
    if machine.kind == "cuda" and not uses_cpu and chosen > len(machine.devices) * num_machines:
        raise Unsuitable(
            f"--num_processes {chosen}: only {len(machine.devices) * num_machines} GPUs are here; each process needs its own"
        )
    return Topology(
        name=path.stem,
        path=path,
        strategy=strategy,
        uses_cpu=uses_cpu or machine.kind == "cpu",
        num_processes=chosen,
        num_machines=num_machines,
        machine_rank=slurm.node_rank if slurm is not None and num_machines > 1 else 0,
        head_address=slurm.head_address if slurm is not None and num_machines > 1 else None,
        reasons=reasons,
    )


def _refuse_hidden_gpus(machine: Machine, num_processes: int | None) -> None:
    """Training on fewer GPUs than a job holds would waste the others without a word; who counts processes means it."""
    num_granted = machine.slurm.num_gpus if machine.slurm is not None else 0
    num_seen = len(machine.devices) if machine.kind == "cuda" else 0
    if num_seen < num_granted and (num_seen == 0 or num_processes is None):
        raise Unsuitable(
            f"Slurm granted {num_granted} GPU{'s' * (num_granted != 1)} on this node, but nvidia-smi shows "
            f"{num_seen or 'none'}: ask for another node (sbatch --exclude NODE) and tell the cluster's staff; or "
            + ("say how many are to be used with --num_processes" if num_seen else "ask for none")
        )


def choose_topology(
    root: Path, machine: Machine, shape: ModelShape | None, work: Work, num_processes: int | None = None
) -> Topology:
    """The simplest topology in which the training fits.

    Args:
        shape: the model's; None where its config.json is not on this machine.
        work: a micro-batch at the recipe's full length.

    Raises:
        UnknownTopology: the YAML that suits is not among the project's.
        Unsuitable: as `build_topology`.
    """
    _refuse_hidden_gpus(machine, num_processes)
    found = f"found     {machine.describe()}"
    num_machines = machine.slurm.num_nodes if machine.slurm is not None else 1
    num_devices = num_processes or max(1, len(machine.devices)) * num_machines
    if machine.kind == "cpu":
        name = "cpu" if num_devices == 1 else "multi_cpu"
        reason = "no accelerator is here; one process uses all cores" if num_devices == 1 else "DDP over gloo"
        if shape is not None:
            plan = plan_memory(shape, "one process" if num_devices == 1 else "DDP", work, num_devices)
            reason += f"; a step peaks near {(plan.peak + CPU_OVERHEAD_BYTES) / GIB:.1f} GiB"
        return build_topology(root, machine, name, num_processes, (found, f"chosen    {name}", f"because   {reason}"))
    smallest = min(device.memory_bytes for device in machine.devices)
    configs = find_configs(root)
    if num_devices == 1:
        candidates: tuple[tuple[str, Strategy], ...] = (
            ("single_gpu", "one process"), ("deepspeed_zero3_offload", "ZeRO-3 offload")
        )  # fmt: skip
    else:
        whole = "multi_node" if num_machines > 1 and "multi_node" in configs else "multi_gpu"
        candidates = ((whole, "DDP"), ("fsdp", "FSDP2"), ("deepspeed_zero3_offload", "ZeRO-3 offload"))
    if shape is None or machine.kind == "mps":
        name, why = candidates[0][0], "the model's size is not known here, so each device is taken to hold it whole"
        if shape is not None:
            why = "one process: Apple's GPU is a single device"
        return build_topology(root, machine, name, num_processes, (found, f"chosen    {name}", f"because   {why}"))
    tried: list[MemoryPlan] = []
    for name, strategy in candidates:
        tried.append(plan_memory(shape, strategy, work, num_devices))
        if fits(tried[-1], smallest, GPU_OVERHEAD_BYTES) or name == candidates[-1][0]:
            break
    lines = (found, f"chosen    {name} ({tried[-1].strategy})", f"because   {_explain(tried, smallest)}")
    return build_topology(root, machine, name, num_processes, lines)


def _explain(tried: list[MemoryPlan], device_bytes: int) -> str:
    def needs(plan: MemoryPlan) -> str:
        return f"{plan.strategy} needs {(plan.peak + GPU_OVERHEAD_BYTES) / GIB:.1f} GiB of {device_bytes / GIB:.0f}"

    if len(tried) == 1:
        return f"{needs(tried[0])} on each device, so nothing need be sharded"
    verdict = "" if fits(tried[-1], device_bytes) else ", which is still too much: lower per_device_batch_size"
    return "; ".join(needs(plan) for plan in tried) + verdict
