"""A topology: how many processes, where, and with which strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.planning.configs import (
    read_num_processes,
    read_parallel_sizes,
    read_strategy,
    read_yaml,
    resolve_config,
)
from onecurve.launcher.planning.memory import Strategy


@dataclass(frozen=True)
class Topology:
    """How many processes, where, with which strategy, and why.

    Attributes:
        name: of the YAML, without its suffix.
        path: the YAML.
        strategy: what the YAML makes accelerate do.
        uses_cpu: it trains on the CPU.
        num_processes: over all machines.
        num_replicas: groups of processes that each hold all weights between them; None if the YAML has no parallelism_config.
        reasons: lines for people to read: what was found, what was chosen, why.
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
    num_replicas: int | None = None

    @property
    def num_shards(self) -> int:
        """Processes among which weights are divided, if the strategy divides them."""
        return self.num_processes // (self.num_replicas or 1)

    @property
    def num_local_processes(self) -> int:
        """Processes on each machine."""
        return max(1, self.num_processes // self.num_machines)

    @property
    def is_distributed(self) -> bool:
        """Whether accelerate starts it through torch's elastic agent, which needs a port."""
        return self.strategy != "one process"


def build_topology(
    root: Path, machine: Machine, name: str, num_processes: int | None, reasons: tuple[str, ...] = ()
) -> Topology:
    """The topology of one YAML on this machine; `num_processes` overrides what the machine and the YAML suggest.

    Raises:
        UnknownTopology: no such YAML, or one that is not valid.
        Unsuitable: too many processes for the YAML or the GPUs, or the YAML does not fit the nodes of the job.
    """
    path = resolve_config(root, name)
    content = read_yaml(path)
    strategy, num_named = read_strategy(content, path), read_num_processes(content, path)
    uses_cpu = bool(content.get("use_cpu", False))
    _check_nodes(machine, path, strategy)
    if not uses_cpu:
        refuse_hidden_gpus(machine, num_processes)
    if strategy == "one process" and num_processes not in (None, 1):
        raise Unsuitable(f"--num_processes {num_processes}: {path.name} runs one process; use multi_cpu or multi_gpu")
    node = machine.node
    num_machines = node.num_nodes if node is not None else 1
    has_gpus = machine.kind == "cuda" and not uses_cpu
    num_gpus = len(machine.devices) * num_machines
    if strategy == "one process":
        chosen = 1
    elif num_processes is not None:
        chosen = num_processes
    elif has_gpus:
        chosen = num_gpus
    elif num_machines > 1:
        chosen = num_machines
    else:  # No GPU: a rehearsal over gloo. A CPU topology's YAML gives the number of processes; others give a cluster's.
        chosen = num_named if uses_cpu else 4 if strategy.startswith("HSDP") else 2
    if has_gpus and chosen > num_gpus:
        raise Unsuitable(f"--num_processes {chosen}: only {num_gpus} GPUs were found, and each process needs its own")
    return Topology(
        name=path.stem,
        path=path,
        strategy=strategy,
        uses_cpu=uses_cpu or machine.kind == "cpu",
        num_processes=chosen,
        num_machines=num_machines,
        machine_rank=node.node_rank if node is not None and num_machines > 1 else 0,
        head_address=node.head_address if node is not None and num_machines > 1 else None,
        reasons=reasons,
        num_replicas=_count_replicas(read_parallel_sizes(content, path), chosen, num_machines, has_gpus),
    )


def _count_replicas(sizes: Mapping[str, int], num_processes: int, num_machines: int, has_gpus: bool) -> int | None:
    """Groups that each hold all weights: the processes of a machine are one, or several where the YAML names fewer shards.

    No group spans machines. A rehearsal without GPUs on one machine is as if this were two.
    """
    if not sizes:
        return None
    if sizes.get("dp_replicate_size", 1) == 1:
        return 1
    if not has_gpus and num_machines == 1:
        return 2 if num_processes % 2 == 0 and num_processes > 2 else 1
    num_local = max(1, num_processes // num_machines)
    num_shards = sizes.get("dp_shard_size", 1)
    return num_processes // (num_shards if num_local % num_shards == 0 else num_local)


def _check_nodes(machine: Machine, path: Path, strategy: Strategy) -> None:
    """Refuse a launch that would train on the first node only, or the same model separately on each node.

    Raises:
        Unsuitable: it would.
    """
    node = machine.node
    if node is None or node.num_nodes == 1:
        return
    if node.is_batch_shell:
        raise Unsuitable(
            f"this is the batch shell of a job on {node.num_nodes} nodes, so only the first node would train; start it on "
            "every node: srun --ntasks-per-node=1 onecurve run ..."
        )
    if strategy == "one process":
        raise Unsuitable(
            f"{path.name} runs one process, so each of this job's {node.num_nodes} nodes would train its own copy of the "
            "model; ask for one node, or use multi_cpu or multi_node"
        )


def refuse_hidden_gpus(machine: Machine, num_processes: int | None) -> None:
    """Refuse to train on fewer GPUs than the job was granted, unless `num_processes` was given.

    Raises:
        Unsuitable: nvidia-smi fails, or shows fewer GPUs than the job was granted.
    """
    if machine.driver_problem is not None:
        raise Unsuitable(describe_driver_problem(machine.driver_problem))
    node = machine.node
    num_granted = node.num_gpus if node is not None else 0
    num_seen = len(machine.devices) if machine.kind == "cuda" else 0
    if node is not None and num_seen < num_granted and (num_seen == 0 or num_processes is None):
        another = "ask for another node (sbatch --exclude NODE)" if node.job_id else "ask for another node"
        raise Unsuitable(
            f"{node.scheduler} granted {num_granted} GPU{'s' * (num_granted != 1)} on this node, but nvidia-smi shows "
            f"{num_seen or 'none'}: {another} and report it to the cluster's support, or "
            + ("give the number to use with --num_processes" if num_seen else "ask for no GPUs")
        )


def describe_driver_problem(problem: str) -> str:
    """What to do about GPUs that can't be used."""
    return (
        f"{problem}, so no GPU can be used: fix that, or hide the GPUs (CUDA_VISIBLE_DEVICES=-1) or name a CPU --topology "
        "(cpu, multi_cpu)"
    )
