"""Which topology suits this machine and this model, and why, in three lines.

A topology is one of accelerate_configs/*.yaml. What a YAML means is read from the YAML itself, so one of your own works
as well as those that come with the project. The choice: one process where there is one device; DDP where a device holds
the whole model with its optimizer; FSDP where it does not; ZeRO-3 with offload last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from onecurve.launcher.errors import UnknownTopology, Unsuitable
from onecurve.launcher.facts.machine import GIB, Machine
from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.planning.memory import (
    CPU_OVERHEAD_BYTES,
    GPU_OVERHEAD_BYTES,
    MemoryPlan,
    Strategy,
    Work,
    describe_host_need,
    fits,
    fits_host,
    plan_memory,
)


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
    from onecurve.training.config import find_nearest

    nearest = find_nearest(name, list(configs))
    hint = f"did you mean {nearest}? " if nearest else ""
    raise UnknownTopology(f"--topology {name}: unknown; {hint}There are: {', '.join(configs)}, or the path of a YAML")


def read_strategy(content: Mapping[str, Any], path: Path = Path("the YAML")) -> Strategy:
    """The strategy that an accelerate YAML makes accelerate use.

    Raises:
        UnknownTopology: a section or a stage is not what accelerate could read.
    """
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind == "DEEPSPEED":
        nested = _read_section(content, "deepspeed_config", path)
        if nested.get("deepspeed_config_file"):
            nested = _read_deepspeed_file(Path(str(nested["deepspeed_config_file"])), path)
        moved = {nested.get("offload_optimizer_device"), nested.get("offload_param_device")} & {"cpu", "nvme"}
        strategies: dict[str, tuple[Strategy, Strategy]] = {
            "0": ("DDP", "DDP"), "1": ("ZeRO-1", "ZeRO-1"), "2": ("ZeRO-2", "ZeRO-2 offload"),
            "3": ("ZeRO-3", "ZeRO-3 offload"),
        }  # fmt: skip
        stage = nested.get("zero_stage", 2)
        if str(stage) not in strategies:
            raise UnknownTopology(f"{path}: deepspeed_config: zero_stage must be 0, 1, 2 or 3, got {stage!r}")
        return strategies[str(stage)][bool(moved)]
    if kind == "FSDP":
        nested = _read_section(content, "fsdp_config", path)
        moved_to_host = nested.get("fsdp_offload_params", nested.get("offload_params"))
        return "FSDP2 offload" if moved_to_host else "FSDP2"
    return "one process" if kind == "NO" else "DDP"


def _read_section(content: Mapping[str, Any], section: str, path: Path) -> dict[str, Any]:
    nested = content.get(section) or {}
    if not isinstance(nested, dict):
        raise UnknownTopology(f"{path}: {section} must be a mapping of keys to values")
    return nested


def _read_deepspeed_file(file: Path, path: Path) -> dict[str, Any]:
    """What DeepSpeed's own JSON says of stage and offload, under the names of accelerate's keys."""
    try:
        zero = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
        devices = {key: (zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")}
        return {"zero_stage": zero.get("stage", 0), **{f"{key}_device": device for key, device in devices.items()}}
    except (OSError, ValueError, AttributeError) as error:
        raise UnknownTopology(
            f"{path}: deepspeed_config_file {str(file)!r} can't be read as DeepSpeed's JSON: {error}"
        ) from None


def _read_num_processes(content: Mapping[str, Any], path: Path) -> int:
    number = content.get("num_processes", 2)
    if isinstance(number, bool) or not str(number).isdigit() or int(number) < 1:
        raise UnknownTopology(f"{path}: num_processes must be a whole number of 1 or more, got {number!r}")
    return int(number)


def build_topology(
    root: Path, machine: Machine, name: str, num_processes: int | None, reasons: tuple[str, ...] = ()
) -> Topology:
    """The topology of one YAML on this machine; `num_processes` beats what the machine and the YAML suggest.

    Raises:
        UnknownTopology: no such YAML, or one that accelerate could not read.
        Unsuitable: more processes asked for than one process by nature can be, or than there are GPUs; or Slurm's nodes
            don't fit it.
    """
    path = resolve_config(root, name)
    content = read_yaml(path)
    strategy, num_named = read_strategy(content, path), _read_num_processes(content, path)
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
        chosen = num_named if uses_cpu else 2
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
    if machine.driver_problem is not None:
        raise Unsuitable(describe_driver_problem(machine.driver_problem))
    num_granted = machine.slurm.num_gpus if machine.slurm is not None else 0
    num_seen = len(machine.devices) if machine.kind == "cuda" else 0
    if num_seen < num_granted and (num_seen == 0 or num_processes is None):
        raise Unsuitable(
            f"Slurm granted {num_granted} GPU{'s' * (num_granted != 1)} on this node, but nvidia-smi shows "
            f"{num_seen or 'none'}: ask for another node (sbatch --exclude NODE) and tell the cluster's staff; or "
            + ("say how many are to be used with --num_processes" if num_seen else "ask for none")
        )


def describe_driver_problem(problem: str) -> str:
    """What to do where nvidia-smi fails."""
    return (
        f"nvidia-smi is here but fails ({problem}), so no GPU can be used: mend the driver; or hide the GPUs "
        "(CUDA_VISIBLE_DEVICES=-1) or name a CPU --topology (cpu, multi_cpu)"
    )


def count_processes(machine: Machine, num_processes: int | None) -> int:
    """Processes over all machines: as many as were asked for, else one a device."""
    num_machines = machine.slurm.num_nodes if machine.slurm is not None else 1
    return num_processes or max(1, len(machine.devices)) * num_machines


def list_candidates(
    kind: Literal["cuda", "mps", "cpu"], num_processes: int, num_machines: int
) -> tuple[tuple[Strategy, str], ...]:
    """What is tried on these devices, the simplest first, and the YAML that does it; `run` and `plan` choose from it.

    ZeRO-2 and ZeRO-3 are not among them: FSDP2 needs less memory than both, and no other package.
    """
    if kind == "cpu":
        return (("one process", "cpu"),) if num_processes == 1 else (("DDP", "multi_cpu"),)
    if num_processes == 1:
        offload: tuple[tuple[Strategy, str], ...] = (("ZeRO-3 offload", "deepspeed_zero3_offload"),)
        return (("one process", "single_gpu"), *(offload if kind == "cuda" else ()))
    return (
        ("DDP", "multi_node" if num_machines > 1 else "multi_gpu"),
        ("FSDP2", "fsdp"),
        ("ZeRO-3 offload", "deepspeed_zero3_offload"),
    )


def choose_topology(
    root: Path, machine: Machine, shape: ModelShape | None, work: Work, num_processes: int | None = None
) -> Topology:
    """The simplest topology in which the training fits.

    Args:
        shape: the model's; None where its config.json is not on this machine.
        work: a micro-batch at the recipe's full length, with as many processes as `count_processes` says.

    Raises:
        UnknownTopology: the YAML that suits is not among the project's.
        Unsuitable: as `build_topology`.
    """
    _refuse_hidden_gpus(machine, num_processes)
    found = f"found     {machine.describe()}"
    num_machines = machine.slurm.num_nodes if machine.slurm is not None else 1
    num_devices = count_processes(machine, num_processes)
    candidates = list_candidates(machine.kind, num_devices, num_machines)
    if machine.kind == "cpu":
        strategy, name = candidates[0]
        reason = "no accelerator is here; one process uses all cores" if num_devices == 1 else "DDP over gloo"
        if shape is not None:
            plan = plan_memory(shape, strategy, work, num_devices)
            reason += f"; a step peaks near {(plan.peak + CPU_OVERHEAD_BYTES) / GIB:.1f} GiB"
        return build_topology(root, machine, name, num_processes, (found, f"chosen    {name}", f"because   {reason}"))
    smallest = min(device.memory_bytes for device in machine.devices)
    if shape is None or machine.kind == "mps":
        name, why = candidates[0][1], "the model's size is not known here, so each device is taken to hold it whole"
        if shape is not None:
            why = "one process: Apple's GPU is a single device"
        return build_topology(root, machine, name, num_processes, (found, f"chosen    {name}", f"because   {why}"))
    tried: list[MemoryPlan] = []
    num_local = max(1, num_devices // num_machines)
    for strategy, name in candidates:
        tried.append(plan_memory(shape, strategy, work, num_devices))
        is_last = name == candidates[-1][1]
        if is_last or (fits(tried[-1], smallest) and fits_host(tried[-1], num_local, machine.memory_bytes)):
            break
    why = _explain(tried, smallest, num_local, machine.memory_bytes)
    lines = (found, f"chosen    {name} ({tried[-1].strategy})", f"because   {why}")
    return build_topology(root, machine, name, num_processes, lines)


def _explain(tried: list[MemoryPlan], device_bytes: int, num_local: int, host_bytes: int) -> str:
    def needs(plan: MemoryPlan) -> str:
        return f"{plan.strategy} needs {(plan.peak + GPU_OVERHEAD_BYTES) / GIB:.1f} GiB of {device_bytes / GIB:.0f}"

    if len(tried) == 1:
        return f"{needs(tried[0])} on each device, so nothing need be sharded"
    verdict = "" if fits(tried[-1], device_bytes) else ", which is still too much: lower per_device_batch_size"
    if not fits_host(tried[-1], num_local, host_bytes):
        verdict += f"; {describe_host_need(tried[-1], num_local, host_bytes)}"
    return "; ".join(needs(plan) for plan in tried) + verdict
