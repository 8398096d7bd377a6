"""The run directory: all that one training leaves behind, and the only place that knows its file names."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import onecurve
from onecurve.training.config import Recipe, RecipeError, ResolvedRecipe, load_recipe
from onecurve.training.errors import BadInput, is_main_process, write_atomically

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "tokenizers",
    "safetensors",
    "deepspeed",
)


# The loader's workers of a killed training hold its lock until they notice, within five seconds.
_SECONDS_TO_LET_GO = 10.0


class DirectoryLock:
    """Keeps a folder for one process: another is refused until this one lets go or ends, however it ends.

    What is locked (flock) is a file in it, which stays: other machines hear of it where a network's file system has locks,
    and of a lock on the folder itself they would not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, is_new: bool = False) -> None:
        """Lock the folder for the whole training, if a run is there and not locked already; process 0 does it for all.

        Raises:
            BadInput: another process holds it.
        """
        if (
            self._descriptor is not None
            or not is_main_process()
            or not (is_new or (self._path / "config.yaml").exists())
        ):
            return
        try:
            descriptor = os.open(self._path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:  # What can't be written to is refused elsewhere, in better words.
            return
        deadline = time.monotonic() + _SECONDS_TO_LET_GO
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise BadInput(
                        f"output_dir {str(self._path)!r}: another training is running there; wait for its end, stop it "
                        f"with `touch {self._path / 'STOP'}`, or choose another output_dir"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                print(f"{self._path}: no locks there ({error.strerror}): start no other training in it", flush=True)
                break
        self._descriptor = descriptor

    @property
    def is_held(self) -> bool:
        """Whether this process has it."""
        return self._descriptor is not None

    def __enter__(self) -> DirectoryLock:
        self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one training's files under `output_dir`."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        """The run directory that the recipe names."""
        return cls(Path(recipe.output_dir))

    @cached_property
    def lock(self) -> DirectoryLock:
        """Held by process 0 of the training that runs here."""
        return DirectoryLock(self.path)

    @property
    def config(self) -> Path:
        """Every resolved value and its source."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Package versions, topology, device names, git revision."""
        return self.path / "environment.json"

    @property
    def status(self) -> Path:
        """State, exit code, step and message."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, every step and every evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of step_00000050/ and its like."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Link to the checkpoint with the best metric."""
        return self.path / "best"

    @property
    def final(self) -> Path:
        """The trained model and its tokenizer, as save_pretrained writes them."""
        return self.path / "final"

    @property
    def hangs(self) -> Path:
        """Stacks of all processes of a training that hung."""
        return self.path / "hangs"

    @property
    def memory(self) -> Path:
        """Micro-batches that were found to fit, where those that were asked for did not."""
        return self.path / "memory.json"

    @property
    def tracker(self) -> Path:
        """The tracker's run that later starts go on with."""
        return self.path / "tracker.json"

    @property
    def eval_predictions(self) -> Path:
        """One line per validation example."""
        return self.path / "eval_predictions.jsonl"

    @property
    def eval_report(self) -> Path:
        """Precision, recall and F1 of each class, and the confusion matrix."""
        return self.path / "eval_report.json"

    @property
    def test_predictions(self) -> Path:
        """As eval_predictions, for the test data."""
        return self.path / "test_predictions.jsonl"

    @property
    def test_report(self) -> Path:
        """As eval_report, for the test data."""
        return self.path / "test_report.json"

    def check_writable(self) -> None:
        """Refuse an `output_dir` that can't hold a run, before anything is written.

        Raises:
            BadInput: it is a file, or neither it nor its nearest existing parent can be written to.
        """
        nearest = self.path
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise BadInput(f"output_dir {str(self.path)!r}: {str(nearest)!r} is a file; choose another output_dir")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise BadInput(
                f"output_dir {str(self.path)!r}: {str(nearest)!r} is not writable; choose another output_dir"
            )

    def read_status(self) -> dict[str, Any] | None:
        """The status of the last training here, if any."""
        try:
            content = json.loads(self.status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def describe_last_evaluation(self) -> str:
        """The last evaluation of this run in a line."""
        for text in reversed(self.metrics.read_text(encoding="utf-8").splitlines()):
            line = json.loads(text)
            if line["event"] == "eval":
                shown = [f"{name} {value:.4f}" for name, value in line.items() if name.startswith("eval_")]
                return f"step {line['step']}, " + ", ".join(shown[:2])
        return "not evaluated"

    def create(self, resolved: ResolvedRecipe, topology: dict[str, Any]) -> None:
        """Make the folder, lock it, and write what is known before the first step.

        Raises:
            BadInput: another training was faster.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        was_new = not self.lock.is_held
        self.lock.take(is_new=True)
        if was_new and self.lock.is_held and self.config.exists():
            raise BadInput(
                f"output_dir {str(self.path)!r}: another training began there and ended while this one was loading; start "
                "this again to go on with it, or choose another output_dir"
            )
        environment = describe_environment(topology) | {"num_starts": self._count_starts() + 1}
        write_atomically(self.config, resolved.to_yaml())
        write_atomically(self.environment, json.dumps(environment, indent=2) + "\n")

    def _count_starts(self) -> int:
        try:
            return int(json.loads(self.environment.read_text(encoding="utf-8"))["num_starts"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def differing_keys(self, resolved: ResolvedRecipe, ignored: frozenset[str]) -> list[str]:
        """Keys, `ignored` ones aside, in which the run that is here differs from `resolved`: "key: here -> wanted".

        Raises:
            BadInput: the config.yaml here can't be read as a recipe.
        """
        try:
            here = load_recipe(str(self.config)).recipe
        except RecipeError as error:
            raise BadInput(
                f"output_dir {str(self.path)!r} holds a run whose config.yaml is not valid: {error}"
            ) from None
        return [
            f"{key}: {getattr(here, key)!r} -> {getattr(resolved.recipe, key)!r}"
            for key in type(here).model_fields
            if key not in ignored and getattr(here, key) != getattr(resolved.recipe, key)
        ]


def describe_environment(topology: dict[str, Any]) -> dict[str, Any]:
    """Package versions, the machine and the git revision, as `environment.json` holds them. No variable's value."""
    # Of the code that runs: in a checkout another version may be installed.
    versions = {"onecurve": onecurve.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "topology": topology,
        "git_revision": _git_revision(),
        "slurm_job_id": _slurm_job_id(),
    }


def _slurm_job_id() -> str | None:
    """The job's number as Slurm's commands take it; a task of an array is ARRAY_TASK, as the last one's own number also
    means all of them."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _git_revision() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
