"""The errors that end a run with a message instead of a traceback, and the exit code of each.

::

    Exception
    ├── RecipeError        2   training/config.py: the recipe is wrong; lists all problems
    └── Fault              1
        ├── BadInput       2   the data, the model or the machine cannot do what the recipe asks
        │   └── SlowPrecision 2   this machine's processor is far slower in bf16 than in float32
        ├── WrongTopology  2   the number of processes is not the requested one, or
        │   └── WrongDevice    a rank has another kind of device than the topology was chosen for
        ├── UnsuitableModel 2  training/models/failures.py: the model's own code fails in the first step
        ├── LostLauncher   1   the launcher died before the first step
        ├── OutOfMemory    1   training/recovery/out_of_memory.py: a micro-batch does not fit the device
        ├── Diverged       3   the loss is not finite, or fp16 skips every step
        └── Preempted     75   stopped on request, with a good checkpoint (prediction writes none)

Every other exception is a bug or a failure of the machine: exit code 1, with its traceback (training/outcome.py).
"""

from __future__ import annotations

from onecurve.training import launch_protocol


class Fault(Exception):
    """An error whose message tells the user what to do; `exit_code` is what the process returns."""

    exit_code = launch_protocol.FAILED
    is_of_one_rank = False
    """Whether only this rank may have the error. Other faults occur on all ranks, and rank 0 alone reports them."""


class BadInput(Fault):
    """The data, the model or the machine cannot do what the recipe asks."""

    exit_code = launch_protocol.BAD_INPUT


class SlowPrecision(BadInput):
    """This machine's processor is far slower in bf16 than in float32. Other machines' may not be."""

    is_of_one_rank = True


class WrongTopology(Fault):
    """The number of processes is not the requested one."""

    exit_code = launch_protocol.BAD_INPUT


class WrongDevice(WrongTopology):
    """This rank has another kind of device than its topology was chosen for."""

    is_of_one_rank = True


class LostLauncher(Fault):
    """The launcher died before the first step. Nothing supervises the ranks any more, so each ends itself."""

    is_of_one_rank = True

    def __init__(self) -> None:
        super().__init__("the launcher died before the first step. Nothing is lost: start it again")


class Diverged(Fault):
    """The loss is not finite."""

    exit_code = launch_protocol.DIVERGED


class Preempted(Fault):
    """Stopped on request: a training resumes from its last checkpoint, a prediction starts again."""

    exit_code = launch_protocol.PREEMPTED


# When another rank dies, gloo and NCCL raise bare RuntimeErrors.
_LOST_CONNECTIONS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "pair closure",
    "NCCL communicator was aborted",
    "remote process exited",
)


def has_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank did."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_CONNECTIONS)
