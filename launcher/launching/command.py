"""The `accelerate launch` command for a recipe on a topology, as plain data that can be printed and copied."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onecurve
from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.facts.machine import DEFAULT_PORT, Machine
from onecurve.launcher.facts.numa import can_bind_to_nodes
from onecurve.launcher.planning.topology import Topology
from onecurve.training.launch_protocol import DEVICE_KIND, choose_allocator

# accelerate then binds each process to the cores near its GPU.
BIND_TO_NODES = "ACCELERATE_CPU_AFFINITY"


@dataclass(frozen=True)
class Command:
    """A process to start: its words, and the variables that it needs besides those of this process."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    num_processes: int

    def to_shell(self) -> str:
        """One line that does the same when pasted into a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, *map(shlex.quote, self.words)])


def find_root() -> Path:
    """The folder that holds this launcher's own training/run.py and accelerate_configs/: a checkout or an installed wheel.

    Never the working directory: it may be a checkout of another version.
    """
    return Path(__file__).resolve().parents[2]


def describe_other_checkout(root: Path) -> str | None:
    """A warning, if the working directory lies in a checkout whose code is not the code that runs, which is in `root`."""
    try:
        here = Path.cwd()
    except OSError:  # A folder that was removed.
        return None
    for folder in (here, *here.parents):
        if (folder / "onecurve" / "__init__.py").is_file() and (folder / "training" / "run.py").is_file():
            if folder == root:
                return None
            return (
                f"warning: this runs onecurve {onecurve.__version__} of {root}, not the checkout {folder}; "
                "`python -m onecurve` in that folder runs the checkout"
            )
    return None


def build_command(machine: Machine, topology: Topology, script: Path, arguments: Sequence[str]) -> Command:
    """The command that runs a script with its arguments on every process of a topology.

    Raises:
        Unsuitable: accelerate is not installed in this environment.
    """
    words = [find_accelerate(), "launch", "--quiet", "--config_file", _shorten(topology.path)]
    words += ["--num_processes", str(topology.num_processes)]
    words += ["--num_cpu_threads_per_process", str(count_threads(topology, machine))]
    if topology.num_machines > 1:
        words += ["--num_machines", str(topology.num_machines), "--machine_rank", str(topology.machine_rank)]
        words += ["--main_process_ip", str(topology.head_address), "--same_network"]
        if topology.strategy.startswith("ZeRO"):
            words += ["--deepspeed_multinode_launcher", "standard"]
    else:
        words += ["--num_machines", "1"]
    if topology.num_replicas is not None:
        words += ["--parallelism_config_dp_replicate_size", str(topology.num_replicas)]
        words += ["--parallelism_config_dp_shard_size", str(topology.num_shards)]
    if topology.is_distributed:
        words += ["--main_process_port", str(choose_port(machine, topology))]
    words += [_shorten(script), *arguments]
    return Command(tuple(words), build_environment(machine, topology), topology.num_processes)


def to_arguments(overrides: Mapping[str, str]) -> list[str]:
    """Keys and values as the flags that training/run.py takes."""
    words = []
    for key, value in overrides.items():
        if key == "eval_only":  # The only key that is a switch.
            words += ["--eval_only"] * (value.lower() == "true")
        else:  # A value that starts with -- would be read as a flag.
            words += [f"--{key}={value}"] if value.startswith("--") else [f"--{key}", value]
    return words


def build_environment(machine: Machine, topology: Topology) -> dict[str, str]:
    """Variables that must be set before Python starts, and the kind of device that ranks must find."""
    if not topology.uses_cpu:
        return {DEVICE_KIND: machine.kind, **(_set_for_cuda(topology) if machine.kind == "cuda" else {})}
    variables = {DEVICE_KIND: "cpu"}
    if topology.strategy.startswith("ZeRO"):
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def _set_for_cuda(topology: Topology) -> dict[str, str]:
    # The launcher counts GPUs as nvidia-smi does, by their place on the bus; CUDA's default order is by speed.
    order = {} if "CUDA_DEVICE_ORDER" in os.environ else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    binding = {}
    if BIND_TO_NODES not in os.environ and can_bind_to_nodes(topology.num_local_processes, os.environ):
        binding = {BIND_TO_NODES: "1"}
    return {**order, **binding, **choose_allocator(os.environ)}


def count_threads(topology: Topology, machine: Machine) -> int:
    """Threads of each process: its share of this machine's cores; at most 8 beside a GPU."""
    share = max(1, machine.num_cores // topology.num_local_processes)
    return share if topology.uses_cpu else min(share, 8)


def choose_port(machine: Machine, topology: Topology) -> int:
    """The port for the process group: in a job its own, which all of its nodes know, else the default or any free one."""
    port = DEFAULT_PORT
    if machine.node is not None:
        port = machine.node.port
        if topology.num_machines > 1:
            return port
    if is_port_free(port):
        return port
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def is_port_free(port: int) -> bool:
    """Whether no process listens on a port of this machine."""
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex(("127.0.0.1", port)) != 0


def find_accelerate() -> str:
    """The `accelerate` of this Python's environment, by its name alone if a shell would find the same one.

    Raises:
        Unsuitable: it is not installed.
    """
    beside = Path(sys.executable).parent / "accelerate"
    on_path = shutil.which("accelerate")
    if beside.exists() and not (on_path and os.path.samefile(on_path, beside)):
        return _shorten(beside)
    if on_path is None:
        raise Unsuitable("accelerate is not installed in this environment: pip install accelerate")
    return "accelerate"


def _shorten(path: Path) -> str:
    """The path relative to the working directory if it lies below it, else the absolute path."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path.absolute())
