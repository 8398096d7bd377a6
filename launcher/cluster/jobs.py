"""The Slurm job of a run directory: `submit` writes its number there, and a training writes the number of its own job."""

from __future__ import annotations

import json
from pathlib import Path

from onecurve.launcher.errors import UsageError
from onecurve.training.run_directory import RunDirectory

# In a job's comment, before the run directory.
COMMENT = "onecurve "


def note_job(run: Path, job_id: str) -> None:
    """Write the job's number into the run directory, where `find_job_id` reads it.

    Raises:
        UsageError: the run directory can't be written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        RunDirectory(run).slurm_job_id.write_text(f"{job_id}\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"output_dir {str(run)!r} can't be written to: {error.strerror}") from None


def find_job_id(target: str | Path) -> str | None:
    """The number of the newest job of a run directory, or `target` itself if it is one, as 123 or 123_4."""
    text = str(target)
    if not Path(target).is_dir():
        return text if parse_job_id(text) is not None else None
    run = RunDirectory(Path(target))
    found = [_read_job_file(run.slurm_job_id), _read_environment(run.environment)]
    return max(
        (job_id for job_id in found if job_id is not None), key=lambda job_id: parse_job_id(job_id) or 0, default=None
    )


def parse_job_id(job_id: str) -> int | None:
    """The number in a job's name, which grows with time; None if it is not a job's name."""
    first, separator, task = job_id.partition("_")
    is_number = first.isascii() and first.isdigit() and (not separator or (task.isascii() and task.isdigit()))
    return int(first) if is_number else None


def _read_job_file(path: Path) -> str | None:
    try:
        job_id = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return job_id if parse_job_id(job_id) is not None else None


def _read_environment(path: Path) -> str | None:
    try:
        job_id = json.loads(path.read_text(encoding="utf-8"))["slurm_job_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return job_id if isinstance(job_id, str) and parse_job_id(job_id) is not None else None
