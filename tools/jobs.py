"""Trainings as real processes in the background, to be stopped, killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from tools.launches import LaunchServer, ServedLauncher, build_arguments, build_environment, start_for_real
from tools.trainings import Run, to_flags

_SCRIPT = """\
import os, sys

from onecurve.training import building, run
from onecurve.training.outcome import end_process, report_outcome

{changes}
code = report_outcome(run.main, sys.argv[1:])
{at_end}
end_process(code)
"""


def write_script(path: Path, changes: str, at_end: str = "") -> str:
    """Write a script that trains as training/run.py does, after Python code that changes something; returns its name.

    Args:
        changes: finds `os`, `sys`, and the modules `building` and `run`.
        at_end: Python code that runs after the training.
    """
    path.write_text(_SCRIPT.format(changes=changes.strip(), at_end=at_end.strip()), encoding="utf-8")
    return str(path)


_HELD_TASK = """\
\"\"\"Text classification whose training waits in one step, once, until a stop is asked for.\"\"\"

import sys
import time
from pathlib import Path

from onecurve.training.process import is_main_process
from onecurve.training.tasks.text_classification import TextClassification

REACHED = Path({reached!r})


class Held(TextClassification):
    def loss_sum(self, model, batch):
        if is_main_process() and not REACHED.exists():
            kept = getattr(sys.modules["__main__"], "_KEPT", None) or sys.modules["onecurve.training.run"]._KEPT
            session = kept[-1]
            if session.progress.step == {step}:
                REACHED.touch()
                deadline = time.monotonic() + 120  # A test whose request is lost fails, and does not hang.
                while not session.stop_flag.is_raised() and time.monotonic() < deadline:
                    time.sleep(0.005)
        return super().loss_sum(model, batch)
"""


@dataclass(frozen=True)
class HeldTask:
    """A task whose training can't end before it is interrupted, however quick the machine is.

    Attributes:
        task: the recipe's `task`; text classification in all else.
        reached: this file is there once rank 0 waits. A later start goes on without waiting.
    """

    task: str
    reached: Path

    def wait_until_reached(
        self, process: ServedLauncher | subprocess.Popen[str] | None = None, seconds: float = 120
    ) -> None:
        """Wait until the training has come to the step in which it waits."""
        deadline = time.monotonic() + seconds
        while not self.reached.exists():
            assert time.monotonic() < deadline, "the training did not get so far"
            assert process is None or process.poll() is None, "the training ended before"
            time.sleep(0.02)


def write_held_task(folder: Path, step: int) -> HeldTask:
    """A task that has made `step` steps when its training waits for a request to stop."""
    path, reached = folder / "held_task.py", folder / "held_task.reached"
    path.write_text(_HELD_TASK.format(reached=str(reached), step=step), encoding="utf-8")
    return HeldTask(f"{path}:Held", reached)


class Job:
    """One `accelerate launch` and all its processes.

    Attributes:
        server: forks the launchers and ranks of jobs, which saves the imports; without one they are new processes.
    """

    server: ClassVar[LaunchServer | None] = None

    def __init__(
        self,
        settings: Mapping[str, Any],
        topology: str = "cpu",
        num_processes: int = 1,
        script: str = "training/run.py",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(str(settings["output_dir"]))
        self._script = script
        words = build_arguments(topology, num_processes, (), script, to_flags(settings))
        variables = build_environment(environment)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._output = self.path.with_name(f"{self.path.name}.output")
        with self._output.open("w") as output:
            start = start_for_real if self.server is None else self.server.start
            self.process = start(words, variables, output, output)
        self._num_processes = num_processes

    @property
    def output(self) -> str:
        """What all its processes have printed so far."""
        return self._output.read_text(encoding="utf-8")

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in the order of their ranks."""
        found = []
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if self._script in process.cmdline() or self._is_forked(process):
                    found.append(process)
        return sorted(found, key=lambda process: (process.create_time(), process.pid))  # As a launcher starts them.

    def is_running(self) -> bool:
        """Whether the launcher is alive."""
        return self.process.poll() is None

    def wait_for_ranks(self) -> None:
        """Wait until every process that is to train has been started."""
        self.wait_until(lambda: len(self.ranks()) == self._num_processes, what="all ranks")

    def members(self) -> list[psutil.Process]:
        """Every process of this job that is alive, orphans too: they print to its file."""
        alive = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_member = str(self.path) in process.cmdline() or self._is_forked(process)
                if is_member and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def _is_forked(self, process: psutil.Process) -> bool:
        """Whether it is a fork of a launch server that prints to this job's file: its command line is the server's."""
        try:
            return os.readlink(f"/proc/{process.pid}/fd/1") == str(self._output)
        except OSError:
            return False

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120, what: str = "") -> float:
        """Wait for a condition while the job runs; returns the seconds that it took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, f"{what or 'it'} did not come about\n{self.output}"
            assert self.process.poll() is None, f"ended before {what or 'it'} came about\n{self.output}"
            time.sleep(0.005)
        return time.monotonic() - started

    def wait_for_step(self, step: int) -> None:
        """Wait until a step's line is written; lines are flushed at evaluations and checkpoints."""
        metrics = self.path / "metrics.jsonl"
        self.wait_until(
            lambda: metrics.exists() and f'"event": "train", "step": {step},' in metrics.read_text(encoding="utf-8"),
            what=f"step {step}",
        )

    def wait_for_end(self, seconds: float = 120) -> float:
        """Wait until none of its processes is left; returns the seconds that it took."""
        started = time.monotonic()
        while self.process.poll() is None or self.members():
            assert time.monotonic() - started < seconds, f"processes are left: {self.members()}\n{self.output}"
            time.sleep(0.02)
        return time.monotonic() - started

    def strike(self, victim: str) -> None:
        """kill -9 of "rank 0", "rank 1", ..., of the "launcher", or of "all"."""
        if victim == "all":
            self.kill()
        elif victim == "launcher":
            self.process.kill()
        else:
            self.ranks()[int(victim.removeprefix("rank "))].kill()

    def kill(self) -> None:
        """kill -9 of the launcher and of all ranks."""
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def finish(self, seconds: float = 300) -> Run:
        """Wait for the end, and look at what is left behind."""
        exit_code = self.process.wait(seconds)
        return Run(exit_code, self.output, self.output, self.path)


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a curve, but for what depends on the machine."""
    machine = ("tokens_per_second", "peak_memory_bytes")
    return [{name: value for name, value in line.items() if name not in machine} for line in lines]


def read_status(path: Path) -> dict[str, Any]:
    """The status of a run directory."""
    content: dict[str, Any] = json.loads((path / "status.json").read_text(encoding="utf-8"))
    return content


def saving(path: Path) -> Iterator[Path]:
    """The folders that are being written at this moment."""
    return (path / "checkpoints").glob(".step_*.tmp")


def count_lines(path: Path) -> int:
    """Lines of a run's curve so far."""
    metrics = path / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def cut_short(run: Run, step: int, target: Path) -> Path:
    """A copy of a run directory as it was when it died some time after the checkpoint of `step`."""
    shutil.copytree(run.path, target, symlinks=True)
    for checkpoint in (target / "checkpoints").iterdir():
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    shutil.rmtree(target / "final")
    (target / "status.json").write_text(
        json.dumps({"state": "running", "exit_code": None, "step": step, "message": ""})
    )
    return target
