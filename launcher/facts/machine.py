"""What this machine has: devices, cores, memory, and the part of it that a Slurm job may use. Needs no torch."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.units import GIB, MIB

_NVIDIA_FIELDS = "index,uuid,name,memory.total,memory.used,compute_cap,driver_version"


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        used_bytes: in use at this moment, by any process.
        compute_capability: of an NVIDIA GPU; 0 if unknown.
        driver_version: the driver's branch, such as 580; 0 if unknown.
    """

    index: int
    name: str
    memory_bytes: int
    used_bytes: int = 0
    compute_capability: float = 0.0
    driver_version: int = 0


@dataclass(frozen=True)
class SlurmStep:
    """This node's place in a Slurm job.

    Attributes:
        num_gpus: granted on this node.
        num_cpus: granted on this node, hyperthreads counted; 0 if Slurm does not say.
    """

    job_id: str
    num_nodes: int
    node_rank: int
    head_address: str
    is_batch_shell: bool
    num_gpus: int = 0
    num_cpus: int = 0


@dataclass(frozen=True)
class Machine:
    """What a training can use here.

    Attributes:
        kind: the device kind that PyTorch would use.
        devices: CUDA devices that are visible; one entry for Apple's GPU; empty on a CPU.
        num_cores: physical cores that this process may use.
        memory_bytes: host memory that this process may use: a container's limit, or the machine's.
        driver_problem: why nvidia-smi is installed but could not list devices; there may be GPUs that can't be used.
    """

    kind: Literal["cuda", "mps", "cpu"]
    devices: tuple[Device, ...]
    num_cores: int
    memory_bytes: int
    slurm: SlurmStep | None = None
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
        Unsuitable: Slurm's environment is incomplete.
    """
    environment = os.environ if environment is None else environment
    devices, problem = find_nvidia_devices(environment)
    memory = read_host_memory()
    kind: Literal["cuda", "mps", "cpu"] = "cuda" if devices else "cpu"
    if not devices and platform.system() == "Darwin" and platform.machine() == "arm64":
        # Apple's GPU shares the host's memory; Metal grants about three quarters of it (recommendedMaxWorkingSetSize).
        kind, devices = "mps", (Device(0, "Apple GPU", memory * 3 // 4),)
    return Machine(kind, devices, count_cores(environment), memory, find_slurm_step(environment), problem)


def find_nvidia_devices(environment: Mapping[str, str]) -> tuple[tuple[Device, ...], str | None]:
    """NVIDIA devices as nvidia-smi lists them, without those that CUDA_VISIBLE_DEVICES hides; and why it failed, if it did."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or shutil.which("nvidia-smi", path=environment.get("PATH")) is None:
        return (), None
    try:
        result = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_NVIDIA_FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=dict(environment),
        )
    except subprocess.TimeoutExpired:
        return (), "no answer within 30 seconds"
    except OSError as error:
        return (), f"it can't be started: {error.strerror}"
    if result.returncode != 0:
        said = " ".join(f"{result.stdout} {result.stderr}".split())
        return (), f"exit code {result.returncode}" + (f": {said[:200]}" if said else "")
    return parse_nvidia_devices(result.stdout, visible), None


def parse_nvidia_devices(text: str, visible: str | None) -> tuple[Device, ...]:
    """Devices from nvidia-smi's CSV, in the order in which CUDA numbers the visible ones."""
    by_name: dict[str, Device] = {}
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != len(_NVIDIA_FIELDS.split(",")):
            continue
        index, uuid, name, total, used, capability, driver = (field.strip() for field in row)
        if not index.isdigit() or not total.isdigit():
            continue  # "[N/A]": a device that is lost, or split by MIG.
        device = Device(
            int(index),
            name,
            int(total) * MIB,
            int(used) * MIB if used.isdigit() else 0,
            _to_float(capability),
            int(_to_float(driver.split(".")[0])),
        )
        by_name[index] = by_name[uuid] = device
    if visible is None:
        return tuple(device for name, device in by_name.items() if name.isdigit())
    chosen = []
    for word in (word.strip() for word in visible.split(",")):
        match = by_name.get(word) or next((by_name[name] for name in by_name if word and name.startswith(word)), None)
        if match is None:
            break  # CUDA ignores everything after the first name that it does not know.
        chosen.append(match)
    return tuple(chosen)


def _to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


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


def find_slurm_step(environment: Mapping[str, str]) -> SlurmStep | None:
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
    return SlurmStep(
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
