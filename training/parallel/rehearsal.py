"""Rehearsal: run the strategies of a cluster on a machine without a GPU.

    python -m onecurve.training.parallel.rehearsal     compile DeepSpeed's operators once, in advance; `make setup` does it

accelerate uses FSDP and DeepSpeed only if the process group has a GPU backend. Here it runs them over gloo.

DeepSpeed compiles small operators at first use. If it is killed while compiling, it leaves a lock file, and every later
start waits for it forever. So the operators are compiled in our own folder, under a lock that ends with its process.
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

from onecurve.training.cache import find_operators

_OPERATORS = ("ShareMemCommBuilder", "CPUAdamBuilder")
_SECONDS_BEFORE_A_NOTE = 60.0


def join_group(uses_deepspeed: bool, timeout: timedelta) -> None:
    """Join the process group over gloo, with a distributed type for which accelerate shards models."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if uses_deepspeed:
        build_operators(["ShareMemCommBuilder"])
    with _without_stdout():
        # cpu=False with an explicit backend joins the group without looking for a device.
        state = PartialState(cpu=False, backend="gloo", timeout=timeout)
    if not uses_deepspeed:
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def build_operators(names: list[str]) -> None:
    """Compile DeepSpeed's operators if they are not compiled yet, one process at a time."""
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(find_operators())))
    folder.mkdir(parents=True, exist_ok=True)
    # ninja is installed beside this Python, which PATH lacks if the environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with _locked(folder):
        # Only the holder of our lock compiles, so a lock file of torch's is left from a start that was killed.
        for stale in folder.rglob("lock"):
            stale.unlink()
        from deepspeed.accelerator import get_accelerator

        for name in names:
            with _without_stdout():
                get_accelerator().create_op_builder(name).load(verbose=False)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "onecurve.lock")
    started = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_SECONDS_BEFORE_A_NOTE)
            break
        except Timeout:
            waited = time.monotonic() - started
            print(
                f"onecurve: waiting until another process has compiled DeepSpeed's operators ({waited:.0f} s)",
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
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    build_operators(list(_OPERATORS))
