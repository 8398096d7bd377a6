"""`sbatch` commands from typed values: rendered as text, checked by Slurm, submitted.

A command is a list of words that no shell interprets, so every name or path is passed literally. Refused are control
characters, and `%` and `\\` in the name of the folder that is submitted from, which sbatch expands in the names of log files.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onecurve.launcher.cluster.commands import run_slurm
from onecurve.launcher.cluster.jobs import COMMENT
from onecurve.launcher.cluster.request import Request
from onecurve.launcher.errors import Unsuitable, UsageError

_CPUS_PER_GPU = 4
_OPTIONS_OF_A_PLACE = ("--account=", "--clusters=", "--partition=", "--qos=", "--reservation=", "-A", "-M", "-p", "-q")


@dataclass(frozen=True)
class Submission:
    """An sbatch command."""

    words: tuple[str, ...]

    def to_shell(self) -> str:
        """One line that does the same when pasted into a shell."""
        return shlex.join(self.words)


def render_training(root: Path, request: Request, run: Path) -> Submission:
    """The command that submits one training.

    Args:
        run: its run directory, which goes into the job's comment, where `find_run` reads it.

    Raises:
        UsageError: a value can't be passed literally.
    """
    return _render(
        root / "slurm" / "finetune.sh",
        request,
        [f"--comment={COMMENT}{run}", *_name_resources(request)],
        [f"--config={request.recipe}"],
    )


def render_sweep(root: Path, request: Request, folder: Path, num_runs: int) -> Submission:
    """The command that submits a job array, one task per trial.

    Args:
        folder: of the run directories.

    Raises:
        UsageError: as `render_training`.
    """
    limit = f"%{request.at_once}" if request.at_once is not None else ""
    options = [f"--comment={COMMENT}{folder}", f"--array=0-{num_runs - 1}{limit}", *_name_resources(request)]
    return _render(root / "slurm" / "sweep.sh", request, options, [f"--sweep={request.sweep}"])


def render_comparison(root: Path, request: Request, array_id: str) -> Submission:
    """The command that submits the comparison of an array's trials, to start when all of them have ended in any way.

    Raises:
        UsageError: as `render_training`.
    """
    # It keeps only the options that choose the place in the queue: a table needs no memory and no constraint.
    place = tuple(option for option in request.options if option.startswith(_OPTIONS_OF_A_PLACE))
    options = [f"--dependency=afterany:{array_id}", "--nodes=1", "--cpus-per-task=1", "--time=10"]
    if request.partition is not None:
        options.append(f"--partition={request.partition}")
    alone = replace(request, options=place, topology=None, num_processes=None)
    return _render(root / "slurm" / "sweep.sh", alone, options, [f"--sweep={request.sweep}"])


def _name_resources(request: Request) -> list[str]:
    options = [f"--nodes={request.num_nodes}"]
    cpus = request.cpus_per_node
    if request.gpus_per_node:
        options.append(f"--gpus-per-node={request.gpus_per_node}")
        cpus = cpus or _CPUS_PER_GPU * request.gpus_per_node
    values = {"cpus-per-task": cpus, "time": request.time, "partition": request.partition}
    options += [f"--{name}={value}" for name, value in values.items() if value is not None]
    if request.dependency is not None:
        # Without the second option, a job that depends on a failed one stays in the queue forever.
        options += [f"--dependency={request.dependency}", "--kill-on-invalid-dep=yes"]
    return options


def _render(script: Path, request: Request, options: Sequence[str], arguments: Sequence[str]) -> Submission:
    for option in request.options:
        if not option.startswith("-"):
            raise UsageError(f"--sbatch {option!r}: expected an option of sbatch, such as --sbatch=--account=NAME")
    named = [f"--job-name={request.job_name}"] if request.job_name is not None else []
    values = {"topology": request.topology, "num_processes": request.num_processes, **request.overrides}
    keys = [f"--{key}={value}" for key, value in values.items() if value is not None]
    words = (
        "sbatch", "--parsable", *named, *options, *request.options, str(script), *arguments, *keys,
    )  # fmt: skip
    for word in words:
        if not word.isprintable():
            raise UsageError(f"{word!r} has a control character, which Slurm's listings and logs can't show; remove it")
    return Submission(words)


def check_folder(folder: Path) -> None:
    """Refuse to submit from a folder whose name sbatch would read as a pattern.

    Raises:
        UsageError: its name has `%`, `\\` or a control character.
    """
    if set("%\\") & set(str(folder)) or not str(folder).isprintable():
        raise UsageError(
            f"{str(folder)!r}: sbatch reads % and \\ in the name of the folder that is submitted from as a pattern, and the job "
            "would fail without a message; submit from another folder"
        )


def check_submission(submission: Submission) -> str:
    """Ask Slurm whether and when it would run this, without submitting it.

    Returns:
        Its answer in a line.

    Raises:
        Unsuitable: Slurm refuses it, or there is no Slurm on this machine.
    """
    result = run_slurm([submission.words[0], "--test-only", *submission.words[1:]])
    answer = " ".join(result.stderr.split())
    if result.returncode != 0:
        raise Unsuitable(f"Slurm refuses the job: {answer}. sinfo lists the partitions with their limits and nodes")
    return answer.removeprefix("sbatch: ")


def submit(submission: Submission) -> str:
    """Submit; returns the job's number.

    Raises:
        Unsuitable: Slurm refuses it.
    """
    result = run_slurm(submission.words)
    if result.returncode != 0:
        raise Unsuitable(f"Slurm refuses the job: {' '.join(result.stderr.split())}")
    return result.stdout.strip().partition(";")[0]  # After a semicolon: the cluster's name, if there are several.
