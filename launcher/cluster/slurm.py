"""What Slurm is told and asked: `sbatch` commands from typed values, and the state of a job.

A command is a list of words that no shell reads, so a name or a path means itself whatever it holds. What Slurm would read
as more than itself is refused: control characters everywhere, and `%` and `\\` in the folder that is submitted from, which
sbatch expands in the names of log files.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from onecurve.launcher.cluster.sweep import name_run
from onecurve.launcher.errors import LaunchFailed, Unsuitable, UsageError

# `submit` leaves the job's number in the run directory, before the training has written anything there.
JOB_FILE = "slurm_job_id"

# In front of the run directory, in a job's comment.
_COMMENT = "onecurve "

_CPUS_PER_GPU = 4
_SECONDS_TO_ANSWER = 60
_COMMENT_WIDTH = 4096

# squeue's name of a field, and its width.
_FIELDS = {"State": 30, "Reason": 80, "RestartCnt": 12, "TimeLeft": 24, "NodeList": 400}
_OPTIONS_OF_A_PLACE = ("--account=", "--clusters=", "--partition=", "--qos=", "--reservation=", "-A", "-M", "-p", "-q")
_ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)


@dataclass(frozen=True)
class Request:
    """What a person asks of Slurm.

    Attributes:
        overrides: the recipe's keys behind the command line's recipe.
        cpus_per_node: cores of each node; None takes the script's, or more where there are GPUs.
        time: in one of sbatch's forms, such as 12:00:00; None takes the script's.
        dependency: in sbatch's words, such as afterok:123.
        options: any other options of sbatch, each as --name=value.
        topology: of `onecurve run`, as is `num_processes`; None lets each node choose.
    """

    recipe: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    num_nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    job_name: str | None = None
    dependency: str | None = None
    options: tuple[str, ...] = ()
    topology: str | None = None
    num_processes: int | None = None


@dataclass(frozen=True)
class Submission:
    """An sbatch command."""

    words: tuple[str, ...]

    def to_shell(self) -> str:
        """One line that does the same when pasted into a shell."""
        return shlex.join(self.words)


@dataclass(frozen=True)
class QueueState:
    """What Slurm says of a job.

    Attributes:
        state: in its words: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ...
        reason: why it waits or has ended; "None" if there is none.
        num_restarts: how often it was queued again.
        nodes: a host list; empty while it waits.
        time_left: until its limit, as Slurm writes it.
    """

    job_id: str
    state: str
    reason: str
    num_restarts: int
    nodes: str
    time_left: str

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in _ENDED

    def describe(self) -> str:
        """A line for people."""
        words = [f"Slurm job {self.job_id}: {self.state}"]
        if self.reason not in ("", "None"):
            words.append(f"({self.reason})")
        if self.nodes:
            words.append(f"on {self.nodes}")
        if self.state == "RUNNING":
            words.append(f"for {self.time_left} more")
        text = " ".join(words)
        if self.num_restarts:
            text += f"; queued again {self.num_restarts} time{'s' * (self.num_restarts != 1)}"
        return text


# Rendering -----------------------------------------------------------------------------------------------------


def render_training(root: Path, request: Request, run: Path) -> Submission:
    """The command that submits one training.

    Args:
        run: its run directory, which `find_run` reads from the job.

    Raises:
        UsageError: a value holds what can't be carried literally.
    """
    return _render(
        root / "slurm" / "finetune.sh", request, [f"--comment={_COMMENT}{run}", *_name_resources(request)], []
    )


def render_sweep(root: Path, request: Request, run: Path, sweep: str, num_runs: int, at_once: int | None) -> Submission:
    """The command that submits an array, a task for each run.

    Args:
        run: the folder of the run directories.

    Raises:
        UsageError: as `render_training`.
    """
    limit = f"%{at_once}" if at_once is not None else ""
    options = [f"--comment={_COMMENT}{run}", f"--array=0-{num_runs - 1}{limit}", *_name_resources(request)]
    return _render(root / "slurm" / "sweep.sh", request, options, [f"--sweep={sweep}"])


def render_comparison(root: Path, request: Request, sweep: str, array_id: str) -> Submission:
    """The command that compares the runs of an array when all of them have ended, however they did.

    Raises:
        UsageError: as `render_training`.
    """
    # Of what was asked for the array it needs the place in the queue alone: a table needs no memory and no constraint.
    place = tuple(option for option in request.options if option.startswith(_OPTIONS_OF_A_PLACE))
    options = [f"--dependency=afterany:{array_id}", "--nodes=1", "--cpus-per-task=1", "--time=10"]
    if request.partition is not None:
        options.append(f"--partition={request.partition}")
    alone = replace(request, options=place, topology=None, num_processes=None)
    return _render(root / "slurm" / "sweep.sh", alone, options, [f"--sweep={sweep}"])


def _name_resources(request: Request) -> list[str]:
    options = [f"--nodes={request.num_nodes}"]
    cpus = request.cpus_per_node
    if request.gpus_per_node:
        options.append(f"--gpus-per-node={request.gpus_per_node}")
        cpus = cpus or _CPUS_PER_GPU * request.gpus_per_node
    values = {"cpus-per-task": cpus, "time": request.time, "partition": request.partition}
    options += [f"--{name}={value}" for name, value in values.items() if value is not None]
    if request.dependency is not None:
        # Without the second, a job that waits for one that has failed waits for ever.
        options += [f"--dependency={request.dependency}", "--kill-on-invalid-dep=yes"]
    return options


def _render(script: Path, request: Request, options: Sequence[str], arguments: Sequence[str]) -> Submission:
    for option in request.options:
        if not option.startswith("-"):
            raise UsageError(f"--sbatch {option!r}: give an option of sbatch, such as --sbatch=--account=NAME")
    named = [f"--job-name={request.job_name}"] if request.job_name is not None else []
    values = {"topology": request.topology, "num_processes": request.num_processes, **request.overrides}
    keys = [f"--{key}={value}" for key, value in values.items() if value is not None]
    words = (
        "sbatch", "--parsable", *named, *options, *request.options, str(script), f"--config={request.recipe}", *arguments,
        *keys,
    )  # fmt: skip
    for word in words:
        if not word.isprintable():
            raise UsageError(f"{word!r} holds a control character, which Slurm's listings and logs do not carry")
    return Submission(words)


def check_folder(folder: Path) -> None:
    """Refuse a folder to submit from whose name sbatch would read as a pattern.

    Raises:
        UsageError: it holds `%` or `\\`.
    """
    if set("%\\") & set(str(folder)) or not str(folder).isprintable():
        raise UsageError(
            f"{str(folder)!r}: sbatch reads % and \\ in the folder that is submitted from as a pattern, and the job would "
            "die without a word; submit from another folder"
        )


# Asking --------------------------------------------------------------------------------------------------------


def check_submission(submission: Submission) -> str:
    """Ask Slurm whether and when it would run this; submits nothing.

    Returns:
        Its answer in a line.

    Raises:
        Unsuitable: it would not, or there is no Slurm here.
    """
    result = _run([submission.words[0], "--test-only", *submission.words[1:]])
    answer = " ".join(result.stderr.split())
    if result.returncode != 0:
        raise Unsuitable(f"Slurm refuses it: {answer}. sinfo shows the partitions, their limits and their nodes")
    return answer.removeprefix("sbatch: ")


def submit(submission: Submission) -> str:
    """Submit; returns the job's number.

    Raises:
        Unsuitable: Slurm refuses it.
    """
    result = _run(submission.words)
    if result.returncode != 0:
        raise Unsuitable(f"Slurm refuses it: {' '.join(result.stderr.split())}")
    return result.stdout.strip().partition(";")[0]  # Behind a semicolon: the cluster's name, where there are several.


def note_job(run: Path, job_id: str) -> None:
    """Leave the job's number where `find_job` looks for it.

    Raises:
        UsageError: the run directory can't be written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / JOB_FILE).write_text(f"{job_id}\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"output_dir {str(run)!r} can't be written to: {error.strerror}") from None


def find_job_id(target: str | Path) -> str | None:
    """The number of the newest job of a run directory, or `target` itself if it is one, as 123 or 123_4."""
    text = str(target)
    if not Path(target).is_dir():
        return text if _order(text) is not None else None
    found = [_read_job_file(Path(target) / JOB_FILE), _read_environment(Path(target) / "environment.json")]
    return max((job_id for job_id in found if job_id is not None), key=lambda job_id: _order(job_id) or 0, default=None)


def find_job(target: str | Path) -> QueueState | None:
    """What Slurm says of a job, by its number or its run directory; of an array, of its first task that is not over.

    Returns:
        None where there is no Slurm, it does not answer, or it has forgotten the job.
    """
    job_id = find_job_id(target)
    if job_id is None or shutil.which("squeue") is None:
        return None
    form = ",".join(f"{name}:{width}" for name, width in _FIELDS.items())
    try:
        result = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--Format={form}"])
    except (LaunchFailed, Unsuitable):
        return None
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    if result.returncode != 0 or not lines:
        return None
    return pick_task([parse_queue_line(job_id, line) for line in lines])


def pick_task(tasks: Sequence[QueueState]) -> QueueState:
    """The one that speaks for an array: it is over when every task is."""
    return next((task for task in tasks if not task.is_over), tasks[0])


def find_run(job_id: str) -> Path | None:
    """The run directory of a job that `submit` has sent; of an array's task its own, of an array their folder.

    Returns:
        None where `submit` has not sent it, or Slurm knows nothing of it.
    """
    number, _, task = job_id.partition("_")
    if _order(job_id) is None or shutil.which("squeue") is None:
        return None
    try:
        result = _run(
            ["squeue", "--noheader", "--states=all", f"--jobs={number}", f"--Format=Comment:{_COMMENT_WIDTH}"]
        )
    except (LaunchFailed, Unsuitable):
        return None
    comment = next(iter(result.stdout.splitlines()), "").rstrip()
    if not comment.startswith(_COMMENT):
        return None
    folder = Path(comment.removeprefix(_COMMENT))
    return name_run(folder, int(task)) if task else folder


def parse_queue_line(job_id: str, line: str) -> QueueState:
    """One line of squeue, in columns of fixed width."""
    values, start = [], 0
    for width in _FIELDS.values():
        values.append(line[start : start + width].strip())
        start += width
    state, reason, restarts, time_left, nodes = values
    return QueueState(job_id, state, reason, int(restarts or 0), nodes, time_left)


def cancel(target: str | Path) -> str:
    """End a job; its training writes a checkpoint if Slurm gives it the time (KillWait). Returns the job's number.

    Raises:
        UsageError: there is no such job.
    """
    job_id = find_job_id(target)
    if job_id is None:
        raise UsageError(f"{str(target)!r} is neither a job's number nor a run directory of one")
    state = find_job(job_id)
    if state is not None and state.is_over:
        raise UsageError(f"job {job_id} is over: {state.state}")
    result = _run(["scancel", job_id])
    if result.returncode != 0:
        raise UsageError(f"job {job_id} could not be ended: {' '.join(result.stderr.split())}")
    return job_id


def _order(job_id: str) -> int | None:
    """A number that grows with time; None for what is no job's number."""
    first, separator, task = job_id.partition("_")
    is_number = first.isascii() and first.isdigit() and (not separator or (task.isascii() and task.isdigit()))
    return int(first) if is_number else None


def _read_job_file(path: Path) -> str | None:
    try:
        job_id = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return job_id if _order(job_id) is not None else None


def _read_environment(path: Path) -> str | None:
    try:
        job_id = json.loads(path.read_text(encoding="utf-8"))["slurm_job_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return job_id if isinstance(job_id, str) and _order(job_id) is not None else None


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        Unsuitable: there is no Slurm here.
        LaunchFailed: it does not answer.
    """
    # A person's defaults for squeue would change what is read here.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}
    try:
        return subprocess.run(
            words,
            env=variables,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS_TO_ANSWER,
            check=False,
        )
    except FileNotFoundError:
        raise Unsuitable(f"{words[0]} is not here: run this on a login node of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchFailed(f"Slurm's {words[0]} has not answered for {_SECONDS_TO_ANSWER} s; try again later") from None
