"""Makes the trials of a sweep one after the other on this machine; started again, it goes on where it was stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from onecurve.launcher.errors import UsageError
from onecurve.launcher.launching.ending import Ending
from onecurve.launcher.sweeps.pruning import Pruning
from onecurve.launcher.sweeps.settings import describe_settings, list_settings
from onecurve.launcher.sweeps.sweep_file import Sweep
from onecurve.launcher.sweeps.tpe import choose_settings
from onecurve.launcher.sweeps.trials import (
    Trial,
    load_trials,
    name_run,
    read_trial,
    save_trials,
)
from onecurve.training.launch_protocol import BAD_INPUT, FINISHED, PREEMPTED
from onecurve.training.run_directory import RunDirectory

# After a sweep was killed, its training notices that after a step, and writes a checkpoint.
_SECONDS_FOR_PROCESSES = 300.0

# Trains with the overrides of one trial, output_dir among them, and says how it ended.
Train = Callable[[Mapping[str, str]], Ending]


@dataclass(frozen=True)
class SweepEnding:
    """How a sweep ended.

    Attributes:
        trials: all that were begun.
        exit_code: 0 if every trial has ended, whatever it ended with; else that of the trial that ended the sweep.
    """

    trials: tuple[Trial, ...]
    exit_code: int


class Search:
    """A sweep in its folder.

    Args:
        overrides: keys of the recipe that the command line changes for all trials.
        folder: of the run directories.
        train: makes one training.
        report: prints a line for the user.
    """

    def __init__(
        self, sweep: Sweep, overrides: Mapping[str, str], folder: Path, train: Train, report: Callable[[str], None]
    ) -> None:
        self._sweep = sweep
        self._overrides = overrides
        self._folder = folder
        self._train = train
        self._report = report
        self._trials: list[Trial] = []

    def run(self) -> SweepEnding:
        """Make every trial that has not ended.

        Raises:
            UsageError: the folder holds another sweep, is not writable, or this sweep runs in it already.
        """
        with _lock(self._folder):
            self._trials = load_trials(self._sweep, self._overrides, self._folder)
            settings = list_settings(self._sweep)
            for number in range(self._sweep.num_trials):
                if number == len(self._trials):
                    chosen = settings[number] if settings else choose_settings(self._sweep, self._trials)
                    self._trials.append(Trial(number=number, settings=chosen))
                if self._trials[number].is_over:
                    continue
                if (exit_code := self._make(number)) != FINISHED:
                    return SweepEnding(tuple(self._trials), exit_code)
        return SweepEnding(tuple(self._trials), FINISHED)

    def _make(self, number: int) -> int:
        """Make one trial; returns an exit code other than 0 if the sweep ends with it."""
        label = f"trial {number + 1} of {self._sweep.num_trials}"
        pruning = Pruning(self._sweep, self._trials[:number], name_run(self._folder, number))
        _wait_for_processes(pruning.run, self._report)
        trial = pruning.judge(read_trial(self._sweep, self._trials[number], self._folder))
        if trial.is_over:  # The sweep was killed when it had ended, and not been noted yet.
            self._note(trial)
            return FINISHED
        self._report(f"{label}: {describe_settings(trial.settings)}")
        self._note(replace(trial, state="running", message=""))
        with pruning:
            ending = self._train({**self._overrides, **trial.settings, "output_dir": str(pruning.run)})
        trial = pruning.judge(read_trial(self._sweep, self._trials[number], self._folder))
        if not trial.is_over:
            if ending.exit_code == PREEMPTED or ending.was_stopped:
                self._report(f"{label}: stopped as asked; the same command goes on with it")
                return PREEMPTED
            if ending.exit_code == BAD_INPUT and number == 0:
                return BAD_INPUT  # What is wrong with the first trial is most likely wrong with all of them.
            cause = ending.message or ending.cause or trial.message
            trial = replace(trial, state="failed", message=f"exit code {ending.exit_code}" + f": {cause}" * bool(cause))
        self._note(trial)
        self._report(f"{label}: {describe_ending(self._sweep, trial)}")
        return PREEMPTED if ending.was_stopped else FINISHED

    def _note(self, trial: Trial) -> None:
        self._trials[trial.number] = trial
        save_trials(self._sweep, self._overrides, self._folder, self._trials)


def describe_ending(sweep: Sweep, trial: Trial) -> str:
    """How a trial ended, for people to read."""
    if trial.state == "finished":
        return f"{sweep.metric} {trial.value:.4g}"
    if trial.state == "pruned":
        return f"pruned after {len(trial.values)} evaluation{'s' * (len(trial.values) != 1)}"
    return f"{trial.state}, {trial.message}" if trial.message else trial.state


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Only one sweep at a time in a folder; the system releases the lock of a killed one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", fallback_to_soft=False)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"output_dir {str(folder)!r}: a sweep is running there; wait until it ends") from None
    except OSError as error:
        raise UsageError(f"output_dir {str(folder)!r} can't be written to: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def _wait_for_processes(run: Path, report: Callable[[str], None]) -> None:
    """Wait until no process trains in a run directory: those of a killed sweep write a checkpoint before they end.

    Raises:
        UsageError: one still does.
    """
    if not RunDirectory(run).config.is_file():
        return
    lock = FileLock(RunDirectory(run).lock, fallback_to_soft=False)
    with contextlib.suppress(OSError):  # A file system without locks: the training says so.
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"waiting until the training in {run} has written its checkpoint")
            try:
                lock.acquire(timeout=_SECONDS_FOR_PROCESSES)
            except Timeout:
                raise UsageError(f"a training still runs in {str(run)!r}: stop it with `touch {run}/STOP`") from None
        lock.release()
