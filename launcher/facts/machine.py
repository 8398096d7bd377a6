"""What this machine has: devices, cores, memory, and its place in a job of several machines. Needs no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.facts.gpus import Device, find_gpus
from onecurve.launcher.units import GIB

# With these any scheduler says what `onecurve run` must know on each node of a job; under Slurm it reads Slurm's own.
NUM_NODES = "ONECURVE_NUM_NODES"
NODE_RANK = "ONECURVE_NODE_RANK"  # 0, 1, ...
HEAD_ADDRESS = "ONECURVE_HEAD_ADDRESS"  # name or address of the node with rank 0
PORT = "ONECURVE_PORT"  # free on that node, the same on all; without it the default
GPUS_PER_NODE = "ONECURVE_GPUS_PER_NODE"  # granted; without it those that are found

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class JobNode:
    """This node's place in a job, which a scheduler has started.

    Attributes:
        job_id: Slurm's; empty if another scheduler, or a person, says the place.
        num_gpus: granted on this node.
        num_cpus: granted on this node, hyperthreads counted; 0 if the scheduler does not say.
        stated_port: the port at which the nodes meet; None: derived from `job_id`.
    """

    job_id: str
    num_nodes: int
    node_rank: int
    head_address: str
    is_batch_shell: bool
    num_gpus: int = 0
    num_cpus: int = 0
    stated_port: int | None = None

    @property
    def port(self) -> int:
        """The port for the process group. Two jobs on one node must not use the same; all nodes of a job must."""
        return self.stated_port if self.stated_port is not None else 20_000 + int(self.job_id) % 10_000

    @property
    def scheduler(self) -> str:
        """Who granted the node, for messages."""
        return "Slurm" if self.job_id else "the scheduler"


@dataclass(frozen=True)
class Machine:
    """What a training can use here.

    Attributes:
        kind: the device kind that PyTorch would use.
        devices: CUDA devices that are visible; one entry for Apple's GPU; empty on a CPU.
        num_cores: physical cores that this process may use.
        memory_bytes: host memory that this process may use: a container's limit, or the machine's.
        driver_problem: why GPUs that are, or may be, here can't be used.
    """

    kind: Literal["cuda", "mps", "cpu"]
    devices: tuple[Device, ...]
    num_cores: int
    memory_bytes: int
    node: JobNode | None = None
    driver_problem: str | None = None

    def describe(self) -> str:
        """One line for people to read."""
        host = f"{self.num_cores} core{'s' * (self.num_cores != 1)}, {self.memory_bytes / GIB:.0f} GiB memory"
        if self.kind == "cpu":
            return f"no GPU{' that can be used' * (self.driver_problem is not None)}, {host}"
        names = sorted({f"{device.name}, {device.memory_bytes / GIB:.0f} GiB" for device in self.devices})
        return f"{len(self.devices)} GPU{'s' * (len(self.devices) != 1)} ({'; '.join(names)}), {host}"


def detect_machine(environment: Mapping[str, str] | None = None) -> Machine:
    """Detect the machine; `environment` replaces the process's own variables.

    Raises:
        Unsuitable: the scheduler's variables are incomplete or can't be read.
    """
    environment = os.environ if environment is None else environment
    memory = read_host_memory()
    devices, problem = find_gpus(environment, memory)
    kind: Literal["cuda", "mps", "cpu"] = "cuda" if devices else "cpu"
    if not devices and platform.system() == "Darwin" and platform.machine() == "arm64":
        # Apple's GPU shares the host's memory; Metal grants about three quarters of it (recommendedMaxWorkingSetSize).
        kind, devices = "mps", (Device(0, "Apple GPU", memory * 3 // 4),)
    return Machine(kind, devices, count_cores(environment), memory, find_job_node(environment), problem)


def count_cores(environment: Mapping[str, str]) -> int:
    """Physical cores that this process may use: its affinity, hyperthreads counted once, within a container's quota.

    Slurm does not always bind a job to the cores that it granted, so their number is a second limit.
    """
    cores, granted = _count_usable_cores(), _count_granted_cores(environment)
    return max(1, min(cores, granted)) if granted else cores


def _count_granted_cores(environment: Mapping[str, str]) -> int:
    granted = environment.get("SLURM_CPUS_ON_NODE", "")
    return int(granted) if granted.isdigit() else 0


def _count_usable_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    siblings = set()
    for core in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings.add(_read_text(path) or str(core))
    quota = _read_text(Path("/sys/fs/cgroup/cpu.max")).split()
    limit = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else len(usable)
    return max(1, min(len(siblings), int(limit)))


def read_host_memory() -> int:
    """Bytes of memory that this process may use."""
    for line in _read_text(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            total = int(value.split()[0]) * 1024
            limit = _read_text(Path("/sys/fs/cgroup/memory.max"))
            return min(total, int(limit)) if limit.isdigit() else total
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def find_job_node(environment: Mapping[str, str]) -> JobNode | None:
    """This node's place in a job, or None outside one: as `$ONECURVE_NUM_NODES` and its like say, else as Slurm does.

    Raises:
        Unsuitable: a variable is missing or can't be read, or as `find_slurm_step`.
    """
    if NUM_NODES not in environment:
        return find_slurm_step(environment)
    num_nodes = _read_number(environment, NUM_NODES, 1)
    rank = _read_number(environment, NODE_RANK, 0) if num_nodes > 1 else 0
    head = environment.get(HEAD_ADDRESS, "")
    if rank >= num_nodes:
        raise Unsuitable(
            f"${NODE_RANK} is {rank}, but the ranks of ${NUM_NODES}={num_nodes} nodes are 0 to {num_nodes - 1}"
        )
    if num_nodes > 1 and not head:
        raise Unsuitable(f"${HEAD_ADDRESS} is not set: with ${NUM_NODES}={num_nodes} it names the node with rank 0")
    return JobNode(
        job_id="",
        num_nodes=num_nodes,
        node_rank=rank,
        head_address=head or "localhost",
        is_batch_shell=False,
        num_gpus=_read_number(environment, GPUS_PER_NODE, 0) if environment.get(GPUS_PER_NODE) else 0,
        stated_port=_read_number(environment, PORT, 1) if environment.get(PORT) else DEFAULT_PORT,
    )


def _read_number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise Unsuitable(f"${name} must be a whole number of {least} or more, got {text!r}")
    return int(text)


def find_slurm_step(environment: Mapping[str, str]) -> JobNode | None:
    """This node's place in a Slurm job, or None outside one.

    Raises:
        Unsuitable: Slurm's host list can't be read, or a node has several tasks.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    num_nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES") or 1)
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or num_nodes)
    if num_tasks > num_nodes:
        raise Unsuitable(
            f"srun has started {num_tasks} tasks on {num_nodes} node{'s' * (num_nodes != 1)}, and each would start a "
            "training; start one task per node: srun --ntasks-per-node=1 onecurve run ..."
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    return JobNode(
        job_id=environment["SLURM_JOB_ID"],
        num_nodes=num_nodes,
        node_rank=int(environment.get("SLURM_NODEID", "0")),
        head_address=first_host(nodes) if num_nodes > 1 else "localhost",
        is_batch_shell="SLURM_STEP_ID" not in environment or environment.get("SLURM_STEP_ID") == "4294967291",
        num_gpus=int(environment.get("SLURM_GPUS_ON_NODE") or 0),
        num_cpus=_count_granted_cores(environment),
    )


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: "gpu[07-09,12],cpu1" gives "gpu07".

    Raises:
        Unsuitable: the list has an unknown form.
    """
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.split(",")[0]
    inside, closing, tail = rest.partition("]")
    if not closing or not inside:
        raise Unsuitable(f"Slurm's host list {nodes!r} can't be read")
    return first_host(head + inside.split(",")[0].split("-")[0] + tail)
