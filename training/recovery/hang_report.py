"""What the ranks of a hung training write about themselves, and the message that is made of it."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

# DeepSpeed's engine reads norms and overflow flags of all ranks in many of its functions.
_COLLECTIVES = (
    os.path.join("torch", "distributed", ""),
    os.path.join("torch", "nn", "parallel", "distributed.py"),
    os.path.join("deepspeed", "comm", ""),
    os.path.join("deepspeed", "runtime", ""),
)

# A collective on a GPU returns at once. A rank then waits where it reads the result: in these functions (None: any) of the
# files whose paths end so. `.cpu()` and similar are native and have no frame of their own.
_WAITS_FOR_DEVICE: tuple[tuple[str | None, str], ...] = (
    ("_engine_run_backward", os.path.join("torch", "autograd", "graph.py")),
    ("synchronize", os.path.join("torch", "cuda", "streams.py")),
    (None, os.path.join("training", "record", "late_values.py")),
    (None, os.path.join("training", "record", "gathering.py")),
    ("copy_in_pieces", os.path.join("training", "recovery", "host_copy.py")),
)

# A message names this many ranks or hosts; with thousands of them the first ones will do.
_MAX_NAMED = 8

Reports = dict[int, dict[str, Any]]
"""By rank: `is_waiting` for the others, its `place` in the code, and its `host`."""

Describe = Callable[[Reports, int, float, Path], str]

_TRAINING = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class HangReports:
    """The reports of all ranks: one file each, with whether the rank waits for others, its place in the code, its stacks."""

    folder: Path
    rank: int
    num_processes: int

    TIMEOUT_SECONDS: ClassVar[float] = 10.0
    """How long the first rank waits for the reports of the others."""

    @property
    def _own_file(self) -> Path:
        return self.folder / f"process_{self.rank:05d}.txt"

    def remove_own(self) -> None:
        """Remove what an earlier training left."""
        self._own_file.unlink(missing_ok=True)

    def write_own(self) -> None:
        """Write this rank's report, with a stack dump of all its threads."""
        frames = list(_frames_of_main_thread())
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = self._own_file.with_suffix(".tmp")
        with staging.open("w", encoding="utf-8") as file:
            own = {"is_waiting": is_waiting(frames), "place": _describe_place(frames), "host": socket.gethostname()}
            file.write(json.dumps(own) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        staging.rename(self._own_file)

    def describe_if_first(self, seconds: float, describe: Describe, patience_seconds: float) -> str | None:
        """The message about the hang, on the first rank that has written a report; None on the others.

        Args:
            seconds: how long there was no progress.
            patience_seconds: how long to wait for the reports of other ranks.
        """
        reports = self.gather(patience_seconds)
        if self.rank != min(reports):
            return None
        return describe(reports, self.num_processes, seconds, self.folder)

    def gather(self, patience_seconds: float = TIMEOUT_SECONDS) -> dict[int, dict[str, Any]]:
        """The reports by rank. A rank that wrote none within the timeout is missing."""
        deadline = time.monotonic() + patience_seconds
        reports: dict[int, dict[str, Any]] = {}
        while len(reports) < self.num_processes and time.monotonic() < deadline:
            for path in self.folder.glob("process_*.txt"):
                rank = int(path.stem.partition("_")[2])
                if rank < self.num_processes:  # An earlier training here may have had more.
                    reports[rank] = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
            time.sleep(0.05)
        return reports


def find_stuck(reports: dict[int, dict[str, Any]], num_processes: int) -> list[int]:
    """The ranks that made no progress while others waited for them; none if all wait, or none does.

    Args:
        reports: by rank: `is_waiting` for the others, and its `place` in the code.
    """
    missing = [rank for rank in range(num_processes) if rank not in reports]
    if missing:
        return missing
    if num_processes == 1:
        return [0]
    busy = sorted(rank for rank, report in reports.items() if not report["is_waiting"])
    return busy if len(busy) < num_processes else []


def describe_hang(reports: dict[int, dict[str, Any]], num_processes: int, seconds: float, folder: Path) -> str:
    """The message: which rank is stuck, where, and where the stack dumps are. For `reports` see `find_stuck`."""
    which = (
        _name_stuck(reports, num_processes, "does not respond") or "all ranks look alike, so the stuck one is not known"
    )
    return (
        f"no progress for {seconds:.0f} seconds (hang_timeout_seconds): {which}. The stack dumps of all ranks are in "
        f"{folder}. Start it again to resume from the last checkpoint; if a step really takes that long, raise "
        "hang_timeout_seconds"
    )


def _name_stuck(reports: dict[int, dict[str, Any]], num_processes: int, silence: str) -> str:
    """The ranks that others wait for, each with its place in the code, or what its silence is called."""
    places = [
        f"rank {rank} is stuck at {reports[rank]['place']}" if rank in reports else f"rank {rank} {silence}"
        for rank in find_stuck(reports, num_processes)
    ]
    return _join_first(places, "; ")


def _join_first(words: Sequence[str], separator: str) -> str:
    return separator.join(words[:_MAX_NAMED]) + " ..." * (len(words) > _MAX_NAMED)


def describe_failed_join(reports: Reports, num_processes: int, seconds: float, folder: Path) -> str:
    """The message about ranks that did not find each other: who waits where, and who does not. As `describe_hang`."""
    hosts = sorted({str(report["host"]) for report in reports.values()})
    num_waiting = sum(bool(report["is_waiting"]) for report in reports.values())
    stuck = _name_stuck(reports, num_processes, "did not report")
    return (
        f"the ranks did not find each other within {seconds:.0f} seconds (join_timeout_seconds): {num_waiting} of "
        f"{num_processes} ranks wait, on {_join_first(hosts, ', ')}{'; ' * bool(stuck)}{stuck}. The stack "
        f"dumps are in {folder}. Look whether every rank still runs and is not still loading (then raise "
        "join_timeout_seconds). Between machines, name the network interface that reaches the others in NCCL_SOCKET_IFNAME "
        "(GPUs) or GLOO_SOCKET_IFNAME (CPUs); NCCL_DEBUG=INFO shows which one was taken"
    )


def _frames_of_main_thread() -> Iterator[FrameType]:
    """From the innermost outwards."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_waiting(frames: list[FrameType]) -> bool:
    """Whether this rank waits for the others: in a collective, in a backward that reduces, or for the device.

    Args:
        frames: from the innermost outwards.
    """
    innermost = frames[0].f_code
    return any(part in innermost.co_filename for part in _COLLECTIVES) or any(
        name in (None, innermost.co_name) and innermost.co_filename.endswith(path) for name, path in _WAITS_FOR_DEVICE
    )


def _describe_place(frames: list[FrameType]) -> str:
    for frame in frames:
        path = Path(frame.f_code.co_filename).resolve()
        if path.is_relative_to(_TRAINING):
            return f"{path.relative_to(_TRAINING.parent)}:{frame.f_lineno} ({frame.f_code.co_name})"
    return "an unknown place"
