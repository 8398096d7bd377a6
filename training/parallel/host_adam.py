"""DeepSpeed's Adam for weights on the host, an operator in C++ that is compiled where the optimizer is offloaded.

    python -m onecurve.training.parallel.host_adam     compile it in advance

It is compiled at first use. A start that is killed meanwhile leaves a lock file, and every later start waits for it forever.
So it is compiled in our own folder, under a lock that ends with its process.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from onecurve.training.cache import find_operators

_SECONDS_BEFORE_A_NOTE = 60.0


def build_host_adam() -> None:
    """Compile it if it is not compiled yet, in one process at a time."""
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(find_operators())))
    folder.mkdir(parents=True, exist_ok=True)
    # ninja is installed beside this Python, which PATH lacks if the environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with _locked(folder), contextlib.redirect_stdout(io.StringIO()):
        # Only the holder of our lock compiles, so a lock file of torch's is left from a start that was killed.
        for stale in folder.rglob("lock"):
            stale.unlink()
        from deepspeed.accelerator import get_accelerator

        get_accelerator().create_op_builder("CPUAdamBuilder").load(verbose=False)


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
                f"onecurve: waiting until another process has compiled DeepSpeed's Adam ({waited:.0f} s)",
                file=sys.stderr,
            )
    try:
        yield
    finally:
        lock.release()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    build_host_adam()
