"""The run directory: the name of every file that one training leaves behind. No other module knows these names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onecurve.training.config import Recipe

CHECKPOINT_PATTERN = "step_*"
"""Of the names of checkpoint folders, in the order of their steps."""

# Files of one checkpoint. Where several processes write, the first two are `part_of` names beside an `index_of` name.
WEIGHTS_FILE = "model.safetensors"
"""Weights and saved buffers by parameter name."""
MOMENTS_FILE = "optimizer.safetensors"
"""AdamW's moments as "<parameter name>.exp_avg" and "<parameter name>.exp_avg_sq"."""
PROGRESS_FILE = "progress.json"
"""Step, schedule, best metric so far."""
MANIFEST_FILE = "manifest.json"
"""Size and checksum of every other file; written last."""


PIECE_BYTES = 256 * 2**20
"""Of a checkpoint, where the training lies in host memory itself: a process keeps at most three such pieces at once
(recovery/piece_writer.py)."""


def count_held_bytes(share_bytes: int, largest_tensor_bytes: int, num_processes: int) -> int:
    """The most that some processes hold of a checkpoint that they write in pieces.

    Args:
        share_bytes: what they write together.
    """
    return min(share_bytes, 3 * max(PIECE_BYTES, largest_tensor_bytes) * num_processes)


def part_of(name: str, part: int, num_parts: int, piece: int = 0) -> str:
    """The file of one of several processes, as transformers names parts: model-00001-of-00002.safetensors.

    Args:
        part: of a process, counted from 0.
        piece: of a large part that is written as several files, counted from 0: model-00001-of-00002-2.safetensors.
    """
    stem, _, ending = name.rpartition(".")
    assert not piece or num_parts > 1, "the one file has one name"
    more = f"-{piece + 1}" if piece else ""
    return name if num_parts == 1 else f"{stem}-{part + 1:05d}-of-{num_parts:05d}{more}.{ending}"


def index_of(name: str) -> str:
    """The file that says which part holds which tensor."""
    return f"{name}.index.json"


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one training's files under `output_dir`."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        """The run directory that the recipe names."""
        return cls(Path(recipe.output_dir))

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunDirectory:
        """The run directory that a checkpoint lies in."""
        return cls(checkpoint.resolve().parent.parent)

    @property
    def config(self) -> Path:
        """Every resolved value and its source. It is written before the first step, so a folder without it holds no run."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Package versions, topology, device names, git revision of the last start."""
        return self.path / "environment.json"

    def past_environment(self, start: int) -> Path:
        """As `environment`, of an earlier start; they are counted from 1."""
        return self.path / "environments" / f"start_{start:04d}.json"

    def read_environment(self) -> dict[str, Any]:
        """The environment of the last start; empty if there was none."""
        return _read_object(self.environment) or {}

    def read_environments(self) -> list[dict[str, Any]]:
        """The environment of each start, the first one first; those that can't be read are left out."""
        paths = [*sorted(self.past_environment(0).parent.glob("start_*.json")), self.environment]
        return [content for path in paths if (content := _read_object(path))]

    @property
    def status(self) -> Path:
        """State, exit code, step and message."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, for every step and every evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint that is written after `step` steps."""
        return self.checkpoints / f"step_{step:08d}"

    def list_checkpoints(self) -> list[Path]:
        """Folders with a checkpoint's name, the oldest first. Whether they are intact is for `find_fault` to say."""
        return list_checkpoints(self.checkpoints)

    @property
    def best(self) -> Path:
        """Link to the checkpoint with the best metric."""
        return self.path / "best"

    @property
    def final(self) -> Path:
        """The trained model and its tokenizer, as save_pretrained writes them."""
        return self.path / "final"

    @property
    def merged(self) -> Path:
        """The whole model that an adapter makes."""
        return self.path / "merged"

    def find_model(self, name: str | None) -> Path | None:
        """The folder of a model of this run: "final", "best", a checkpoint's name or its step; None if there is none.

        Args:
            name: None is final/.
        """
        if name is not None and name.isdecimal():
            name = self.checkpoint(int(name)).name
        folders = {"final": self.final, "best": self.best, **{path.name: path for path in self.list_checkpoints()}}
        folder = folders.get("final" if name is None else name)
        return folder if folder is not None and folder.is_dir() else None

    def describe_missing_model(self, name: str | None) -> str:
        """Why `find_model` found none, and what there is."""
        names = self.list_models()
        there = f"--checkpoint takes {', '.join(names)}" if names else "it has no checkpoint either"
        if name is None:
            return f"{str(self.path)!r} has no final/: its training has not finished; {there}"
        return f"--checkpoint: {str(self.path)!r} has no {name!r}; {there}"

    def list_models(self) -> list[str]:
        """The names that `find_model` takes here."""
        names = [name for name, folder in (("final", self.final), ("best", self.best)) if folder.is_dir()]
        return names + [path.name for path in self.list_checkpoints()]

    @property
    def hangs(self) -> Path:
        """Stack dumps of all ranks of a training that hung."""
        return self.path / "hangs"

    @property
    def memory(self) -> Path:
        """The micro-batch size that fits, if the recipe's did not."""
        return self.path / "memory.json"

    @property
    def tracker(self) -> Path:
        """The id of the tracker's run, which later starts continue."""
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
    def samples(self) -> Path:
        """What the model made of a few validation examples, one JSON object a line, at each evaluation."""
        return self.path / "samples.jsonl"

    @property
    def test_predictions(self) -> Path:
        """As eval_predictions, for the test data."""
        return self.path / "test_predictions.jsonl"

    @property
    def test_report(self) -> Path:
        """As eval_report, for the test data."""
        return self.path / "test_report.json"

    @property
    def stop(self) -> Path:
        """A file whose existence requests a stop of the training here."""
        return self.path / "STOP"

    @property
    def lock(self) -> Path:
        """A file that rank 0 of the training here keeps locked."""
        return self.path / ".lock"

    @property
    def slurm_job_id(self) -> Path:
        """The number of the Slurm job that `onecurve submit` sent for this run."""
        return self.path / "slurm_job_id"

    @property
    def report(self) -> Path:
        """The page that `onecurve report` writes."""
        return self.path / "report.html"

    def read_status(self) -> dict[str, Any] | None:
        """The status of the last training here, if any."""
        return _read_object(self.status)

    def read_memory(self) -> dict[str, Any] | None:
        """What size of micro-batches an earlier start found to fit, if it ran out of memory."""
        return _read_object(self.memory)


def _read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none or it can't be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def list_checkpoints(folder: Path) -> list[Path]:
    """As `RunDirectory.list_checkpoints`, for a folder of checkpoints."""
    return sorted(folder.glob(CHECKPOINT_PATTERN))
