"""What `accelerate launch` set up, read from the environment, and the checks that refuse a launch which went wrong.

If an accelerate YAML starts fewer processes than requested, each of them trains the same model alone, without an error.
Such a launch is refused here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate.tracking import get_available_trackers

from onecurve.training import launch_protocol, parallel_sizes
from onecurve.training.config import Recipe
from onecurve.training.errors import BadInput, LostLauncher, SlowPrecision, WrongDevice, WrongTopology
from onecurve.training.models.shares import Cut
from onecurve.training.parallel.product_timing import measure_product_rates
from onecurve.training.product_rates import ProductRates

GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""By which torch finds a process group."""

JOINING_SECONDS = 600.0
"""How long processes that no agent supervises wait for each other."""


@dataclass(frozen=True)
class Launch:
    """What the launcher set in the environment of this process.

    Attributes:
        parallel_sizes: of accelerate's parallelism_config, by their names in it; None where the YAML has none.
    """

    rank: int
    local_rank: int
    num_processes: int
    num_local_processes: int
    is_distributed: bool
    uses_deepspeed: bool
    uses_fsdp: bool
    uses_cpu: bool
    parallel_sizes: Mapping[str, int] | None = None

    @classmethod
    def from_environment(cls) -> Launch:
        """Read torchrun's and accelerate's variables.

        Raises:
            BadInput: one of them is not a number.
        """
        environment = os.environ
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if not environment.get(name, "0").isdecimal():
                raise BadInput(f"${name} is {environment[name]!r}, not a number: left over? Then `unset {name}`")
        return cls(
            rank=int(environment.get("RANK", "0")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            num_processes=int(environment.get("WORLD_SIZE", "1")),
            num_local_processes=int(environment.get("LOCAL_WORLD_SIZE", "1")),
            is_distributed="LOCAL_RANK" in environment,
            uses_deepspeed=environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true",
            uses_fsdp=environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
            uses_cpu=environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"),
            parallel_sizes=_read_parallel_sizes(environment),
        )

    @property
    def num_replicas(self) -> int:
        """How many groups of processes hold all weights between them, where the strategy divides these."""
        return (self.parallel_sizes or {}).get("dp_replicate_size", 1)

    @property
    def is_unsupervised(self) -> bool:
        """Whether the variables of a process group are set, but neither by torch's agent nor by MPI."""
        mpi = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
        return self.is_distributed and not any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", *mpi))

    def find_cut(self) -> Cut | None:
        """This process's part of each weight, where the strategy divides all of them; None where each holds a replica."""
        if self.num_processes == 1 or not self.is_distributed:
            return None
        if self.uses_fsdp and os.environ.get("FSDP_VERSION") == "2":
            num_parts = self.num_processes // self.num_replicas
            return Cut(self.rank % num_parts, num_parts, is_flat=False)
        if self.uses_deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
            return Cut(self.rank, self.num_processes, is_flat=True)
        return None

    def find_device_type(self) -> str:
        """The type of device to train on: cuda, mps, xpu, ... or cpu."""
        device = None if self.uses_cpu else torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if device is None else device.type


def _read_parallel_sizes(environment: Mapping[str, str]) -> Mapping[str, int] | None:
    """The sizes of accelerate's parallelism_config, where there is one."""
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return None
    variables = {name: f"PARALLELISM_CONFIG_{name.upper()}" for name in parallel_sizes.SIZES}
    for variable in variables.values():
        if not environment.get(variable, "1").isdecimal():
            raise BadInput(
                f"${variable} is {environment[variable]!r}, not a number: parallelism_config of accelerate's YAML sets it"
            )
    return {name: int(environment.get(variable, "1")) for name, variable in variables.items()}


def check_launch(recipe: Recipe) -> str | None:
    """Refuse a launch that lost processes, and a machine that cannot do what the recipe asks, before any other work.

    Returns:
        How fast the recipe's precision is here, if that was measured.

    Raises:
        WrongTopology: fewer processes started than requested.
        SlowPrecision: the processor has no arithmetic of its own for the recipe's bf16.
        BadInput: the tracker is not installed, or the device does not support the recipe's mixed_precision or
            gradient_checkpointing.
    """
    if recipe.report_to != "none" and recipe.report_to not in {str(name) for name in get_available_trackers()}:
        raise BadInput(f"report_to: {recipe.report_to} is not installed; `pip install onecurve[trackers]` installs it")
    for unsupported in (find_unsupported_precision(recipe), find_unsupported_checkpointing(recipe)):
        if unsupported is not None:
            raise BadInput(unsupported)
    check_processes()
    check_device()
    rates = measure_bf16(recipe)
    if rates is None:
        return None
    problem = rates.find_problem()
    if problem is not None and not recipe.allow_slow_bf16:
        raise SlowPrecision(problem)
    return f"bf16: {rates.describe()}"


def measure_bf16(recipe: Recipe) -> ProductRates | None:
    """How fast bf16 is beside float32, if the recipe asks for it on a CPU; measured by one process of each machine."""
    launch = Launch.from_environment()
    if recipe.mixed_precision != "bf16" or launch.find_device_type() != "cpu" or launch.local_rank != 0:
        return None
    return measure_product_rates()


def check_device() -> None:
    """Refuse a rank whose device is not of the kind that the launcher found: it would train on its CPU, or not be joined.

    Raises:
        WrongDevice: it is not.
    """
    expected = os.environ.get(launch_protocol.DEVICE_KIND)
    launch = Launch.from_environment()
    found = launch.find_device_type()
    if expected is None or expected == found:
        return
    reason = f" ({find_cuda_problem()})" if expected == "cuda" and found == "cpu" else ""
    raise WrongDevice(
        f"rank {launch.rank} on {socket.gethostname()}: the topology was chosen for {expected}, but PyTorch finds only "
        f"{found} here{reason}; mend the driver or PyTorch's installation, or train on the CPU with --topology cpu"
    )


def find_cuda_problem() -> str:
    """Why PyTorch does not find a CUDA device."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:200]
    return "it sees no device"


def find_unsupported_precision(recipe: Recipe) -> str | None:
    """Why this device does not support the recipe's mixed_precision; None if it does."""
    device = Launch.from_environment().find_device_type()
    if recipe.mixed_precision == "fp16" and device in ("cpu", "mps"):
        return f"mixed_precision: fp16 needs a GPU, this is {device}; use bf16 or no"
    if (
        recipe.mixed_precision == "bf16"
        and device == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "mixed_precision: this GPU has no bf16 arithmetic (Ampere or newer has); use fp16 or no"
    return None


def find_unsupported_checkpointing(recipe: Recipe) -> str | None:
    """Why this device can't recompute activations; None if it can."""
    drops = recipe.dropout != 0 or (recipe.adapter != "none" and recipe.lora_dropout != 0)
    if recipe.gradient_checkpointing and drops and Launch.from_environment().find_device_type() == "mps":
        return (
            "gradient_checkpointing: on an Apple GPU the recomputed activations would have other dropout masks, and the "
            "gradients would be wrong (pytorch#194478); set gradient_checkpointing: false, or dropout: 0 and lora_dropout: 0"
        )
    return None


def check_processes() -> None:
    """Refuse a launch that lost processes, or divides a model in a way that would change the curve.

    Raises:
        WrongTopology: fewer processes started than requested, or the sizes of parallelism_config are not possible.
    """
    launch = Launch.from_environment()
    requested = os.environ.get(launch_protocol.NUM_PROCESSES)
    if requested is not None and requested != str(launch.num_processes):
        raise WrongTopology(
            f"{requested} processes were requested, {launch.num_processes} started; "
            "each would train the same model alone. Use a YAML of accelerate_configs/, such as multi_cpu.yaml."
        )
    if launch.parallel_sizes is not None:
        problem = parallel_sizes.find_problem(launch.parallel_sizes, launch.num_processes)
        if problem is not None:
            raise WrongTopology(problem)
    if launch.is_unsupervised:
        print(describe_waiting(launch), file=sys.stderr, flush=True)
    # accelerate's launcher for one process sets the address of a process group, then starts only one process.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise WrongTopology(
            "several processes were requested, one started: `accelerate launch --cpu --num_processes N` and "
            "`distributed_type: MULTI_CPU` start a single process. Use accelerate_configs/multi_cpu.yaml."
        )


def check_store() -> None:
    """Stop if the store through which the ranks find each other does not exist any more.

    Torch retries an unreachable store until the collective timeout. torch's agent hosts the store, in the launcher or on
    the first machine, and opens it before it starts any rank; so a refused connection means that the agent has died.

    Raises:
        LostLauncher: the store refuses connections.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        socket.create_connection(address, timeout=10).close()
    except ConnectionRefusedError:
        raise LostLauncher from None
    except OSError:
        pass  # It may only be slow, with thousands of ranks connecting. Torch retries.


def describe_waiting(launch: Launch) -> str:
    """What a process that was started alone waits for, and how that is ended if nobody meant it."""
    return (
        f"onecurve: rank {launch.rank} of {launch.num_processes} processes, which meet at {_find_address()}, as the environment "
        f"says; it waits for them for {JOINING_SECONDS / 60:g} minutes. If these variables are left over: unset "
        f"{_list_group_variables()}"
    )


@contextlib.contextmanager
def limited_joining(launch: Launch, report: Callable[[str], None]) -> Iterator[None]:
    """End this process if the processes of a group that nobody supervises do not meet within minutes.

    torch's own limit is that of a collective, which is hours; the agent that usually starts the processes sees one that
    does not come.

    Args:
        report: called with the message, before the process ends with exit code 2.
    """

    def end() -> None:
        message = (
            f"the {launch.num_processes} processes did not meet at {_find_address()} within {JOINING_SECONDS / 60:g} "
            f"minutes; start all of them, or unset {_list_group_variables()} to train with one"
        )
        report(message)
        print(f"onecurve: {message}", file=sys.stderr, flush=True)
        os._exit(launch_protocol.BAD_INPUT)

    if not launch.is_unsupervised:
        yield
        return
    timer = threading.Timer(JOINING_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _list_group_variables() -> str:
    return " ".join(name for name in GROUP_VARIABLES if name in os.environ)


def _find_address() -> str:
    return f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
