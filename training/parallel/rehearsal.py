"""Rehearsal: the strategies of a cluster, for real, on a machine without an accelerator.

    python -m onecurve.training.parallel.rehearsal     compile DeepSpeed's operators once, unhurried; `make setup` does it

accelerate takes its DeepSpeed and FSDP paths only for GPU kinds of processes; here they are told that they are one, and
run over gloo. DeepSpeed compiles small operators at first use: a start killed in the middle of that leaves a lock file
behind on which every later start waits for ever. Here they are compiled in a folder of our own, under a lock that dies
with its process.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from filelock import FileLock, Timeout

from onecurve.training.cache import find_cache

_OPERATORS = ("ShareMemCommBuilder", "CPUAdamBuilder")
_SECONDS_BEFORE_SAYING_WHY = 60.0


def join_group(uses_deepspeed: bool, timeout: timedelta) -> None:
    """Join the process group over gloo, as the kind of process that accelerate shards models on."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if uses_deepspeed:
        build_operators(["ShareMemCommBuilder"])
    with _without_stdout():
        # use_cpu=False with a backend joins the group without asking for a device.
        state = PartialState(cpu=False, backend="gloo", timeout=timeout)
    if not uses_deepspeed:
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def build_operators(names: list[str]) -> None:
    """Compile DeepSpeed's operators, or find them compiled; processes take turns."""
    cache = find_cache()
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "torch_extensions")))
    folder.mkdir(parents=True, exist_ok=True)
    # ninja lies beside this Python; PATH lacks it where the environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _take_turns(folder):
        # Nobody compiles while this lock is held, so a lock file of torch's is left over from a start that was killed.
        for stale in folder.rglob("lock"):
            stale.unlink()
        from deepspeed.accelerator import get_accelerator

        for name in names:
            with _without_stdout():
                get_accelerator().create_op_builder(name).load(verbose=False)


@contextlib.contextmanager
def _take_turns(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "onecurve.lock")
    started = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_SECONDS_BEFORE_SAYING_WHY)
            break
        except Timeout:
            waited = time.monotonic() - started
            print(
                f"onecurve: waiting for another process to compile DeepSpeed's operators ({waited:.0f} s)",
                file=sys.stderr,
            )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


if __name__ == "__main__":
    build_operators(list(_OPERATORS))
