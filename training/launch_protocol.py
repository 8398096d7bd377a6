"""What the launcher and the training that it starts agree on: environment variables, signals, exit codes."""

from __future__ import annotations

import signal
from collections.abc import Mapping

# Variables that the launcher sets for the processes that it starts.
STATUS_FILE = "ONECURVE_STATUS_FILE"  # where rank 0 writes the status, besides the run directory
STOP_FILE = "ONECURVE_STOP_FILE"  # a file whose appearance asks for a checkpoint and a stop
NUM_PROCESSES = "ONECURVE_NUM_PROCESSES"  # processes that were asked for, to be compared with those that came up
DEVICE_KIND = "ONECURVE_DEVICE"  # cuda, mps, cpu, ...: what the topology was chosen for
RESTARTS_LEFT = "ONECURVE_RESTARTS_LEFT"  # how often the launcher will still start the training again after a failure

# How a line of training/check.py begins that holds an example as JSON: [[text of a token, whether it is a target], ...].
EXAMPLE_LINE = "example-json "

# Each asks for a checkpoint and an end. SIGHUP is what a lost terminal sends, and torch's agent passes it on.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)

# Exit codes of a training.
FINISHED = 0
FAILED = 1
BAD_INPUT = 2
DIVERGED = 3
PREEMPTED = 75


def choose_allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable with which torch's allocator for GPUs may enlarge its segments, unless the user has set it.

    Micro-batches of many lengths fragment memory otherwise: a decoder took 41.8 GiB for what 33.1 GiB hold, and near the
    device's limit a step took 1.3 times as long (benchmarks/NOTES.md).
    """
    if "PYTORCH_ALLOC_CONF" in environment or "PYTORCH_CUDA_ALLOC_CONF" in environment:  # The older name of the same.
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
