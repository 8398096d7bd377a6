"""The `accelerate launch` command for a recipe on a topology, as plain data that can be printed and copied."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onecurve
from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.planning.topology import Topology

DEFAULT_PORT = 29500

# glibc hands large blocks back to the system and fetches them again at each step; kept, a CPU trains 1.1 to 1.5 times as
# fast. They must be set before Python starts.
GLIBC_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Command:
    """A process to start: its words, and the variables that it needs besides the present ones."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    num_processes: int

    def to_shell(self) -> str:
        """One line that does the same when pasted into a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, *map(shlex.quote, self.words)])


def find_root() -> Path:
    """The folder that holds this launcher's own training/run.py and accelerate_configs/: a checkout or an installed wheel.

    Never the working directory: another checkout there may be another version.
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


def build_command(
    root: Path,
    recipe: str,
    overrides: Mapping[str, str],
    topology: Topology,
    machine: Machine,
    script: str = "run.py",
    recipe_flag: str = "--config",
) -> Command:
    """The command that trains `recipe` on `topology`, or runs another script of training/ there.

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
    if topology.is_distributed:
        words += ["--main_process_port", str(choose_port(machine, topology))]
    words += [_shorten(root / "training" / script), recipe_flag, recipe]
    for key, value in overrides.items():
        if key == "eval_only":  # The one switch among the keys.
            words += ["--eval_only"] * (value.lower() == "true")
        else:  # A value that looks like a flag would be taken for one.
            words += [f"--{key}={value}"] if value.startswith("--") else [f"--{key}", value]
    return Command(tuple(words), build_environment(topology), topology.num_processes)


def build_environment(topology: Topology) -> dict[str, str]:
    """Variables that have to be there before Python starts."""
    if not topology.uses_cpu:
        return {}
    variables = {"DS_ACCELERATOR": "cpu"} if topology.strategy.startswith("ZeRO") else {}
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        variables.update({name: value for name, value in GLIBC_ALLOCATOR.items() if name not in os.environ})
    return variables


def count_threads(topology: Topology, machine: Machine) -> int:
    """Threads of each process: this machine's cores shared out on a CPU; beside GPUs likewise, at most 8."""
    share = max(1, machine.num_cores // topology.num_local_processes)
    return share if topology.uses_cpu else min(share, 8)


def choose_port(machine: Machine, topology: Topology) -> int:
    """A port for the processes to meet on: in a Slurm job derived from its number, else the usual one or any that is free.

    Two jobs that share a node must not meet on one port, and all nodes of a job must agree on it without talking.
    """
    port = DEFAULT_PORT
    if machine.slurm is not None:
        port = 20_000 + int(machine.slurm.job_id) % 10_000
        if topology.num_machines > 1:
            return port
    if is_port_free(port):
        return port
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def is_port_free(port: int) -> bool:
    """Whether nobody listens on a port of this machine."""
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex(("127.0.0.1", port)) != 0


def find_accelerate() -> str:
    """The `accelerate` of this Python's environment: by its name if that is what a shell would find.

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
    """The path from here if it lies below, else the whole of it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path.absolute())


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """`--key value` words behind a recipe, as the training itself reads them.

    Raises:
        RecipeError: a word is no flag, a flag has no value or is given twice.
    """
    from onecurve.training.config import parse_arguments

    return parse_arguments(words)[1]
