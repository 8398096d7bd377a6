"""Rehearsal: run the strategies of a cluster on a machine without a GPU.

accelerate uses FSDP and DeepSpeed only if the process group has a GPU backend. Here it runs them over gloo.
"""

from __future__ import annotations

import contextlib
import io
import os
from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import DistributedType


def join_group(uses_deepspeed: bool, timeout: timedelta) -> None:
    """Join the process group over gloo, with a distributed type for which accelerate shards models."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if uses_deepspeed:
        _do_without_operators()
    with contextlib.redirect_stdout(io.StringIO()):
        # cpu=False with an explicit backend joins the group without looking for a device.
        state = PartialState(cpu=False, backend="gloo", timeout=timeout)
    if not uses_deepspeed:
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _do_without_operators() -> None:
    """Keep DeepSpeed from compiling an operator for a minute, which only its inference uses.

    It looks whether the operator is in the table of those that it could compile, and fills that with compilers' runs first.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
