"""Writes checkpoints, while the training continues, and the final model.

Training waits only while the state is copied to host memory. A thread of rank 0 writes the copy, reads it back and
publishes it. Rank 0 needs host memory for the whole state: in float32, 12 bytes a parameter (weight and two moments).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from onecurve.training.errors import Fault
from onecurve.training.models.adapters import has_adapter, save_adapter
from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.parallel.loss_scale import read_loss_scale
from onecurve.training.parallel.states import NamedTensors, Tensors, count_updates, unwrap, whole_moments, whole_weights
from onecurve.training.recovery.checkpoints import find_checkpoint
from onecurve.training.recovery.host_copy import HostCopy
from onecurve.training.recovery.manifest import write_manifest
from onecurve.training.recovery.milestones import Progress
from onecurve.training.recovery.publishing import link_best, publish, remove, sync
from onecurve.training.recovery.room import check_free_space
from onecurve.training.run_directory import MOMENTS_FILE, PROGRESS_FILE, WEIGHTS_FILE, RunDirectory


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run, and removes old ones over `save_total_limit`.

    Attributes:
        save_description: writes what makes a checkpoint a model that `from_pretrained` loads: its config and tokenizer.

    Leaving it as a context waits for a write in progress, however the training ended.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    scheduler: Any
    run: RunDirectory
    save_total_limit: int | None
    save_description: Callable[[Path], None] = lambda folder: None
    _weights: HostCopy = field(default_factory=HostCopy)
    _moments: HostCopy = field(default_factory=HostCopy)
    _thread: threading.Thread | None = None
    _problem: str | None = None
    _is_held: bool = False
    _description: dict[str, bytes] | None = None

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Copy the state of all ranks, and start to write it as checkpoints/step_N; `best` will link to it if it is best.

        Returns after the copy: the training may continue and change its weights.

        Raises:
            Fault: on every rank, if the previous checkpoint could not be written.
        """
        self.hold(progress)
        self._is_held = False
        if self.accelerator.is_main_process:
            best = None if progress.best_step is None else self.run.checkpoint(progress.best_step)
            arguments = (self.run.checkpoint(progress.step), json.dumps(progress.to_dict()), best, is_best)
            # Not a daemon thread: the interpreter waits for it before it exits.
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()

    def hold(self, progress: Progress) -> None:
        """Copy the state of all ranks now: the next `save` writes it, whatever the model has become by then.

        Raises:
            Fault: on every rank, if the previous checkpoint could not be written.
        """
        self.wait()
        if self._is_held:
            return
        progress.scheduler = self.scheduler.state_dict()
        progress.optimizer_step = count_updates(self.optimizer)
        progress.loss_scale = read_loss_scale(self.accelerator, self.optimizer)
        self._copy(whole_weights(self.accelerator, self.model), self._weights)
        self._copy(whole_moments(self.accelerator, self.model, self.optimizer), self._moments)
        self._is_held = True

    def has_failed(self) -> bool:
        """Whether this rank knows of a checkpoint that could not be written."""
        return self._problem is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is complete under its name. Every rank must call it.

        Raises:
            Fault: on every rank, if rank 0 could not write it. Earlier checkpoints are intact.
        """
        self._join()
        self._agree(self._problem)

    def describe_last(self) -> str:
        """The last good checkpoint, in a sentence."""
        self._join()
        last, _ = find_checkpoint(self.run.checkpoints)
        return "There is no checkpoint yet" if last is None else f"The last good checkpoint is {last}"

    def save_final(self, tokenizer: Any, model_card: str, target: Path) -> None:
        """Write final/ with save_pretrained, and compare the weights that are read back with the trained ones.

        Raises:
            Fault: on every rank: a checkpoint or final/ could not be written, or weights differ when read back.
        """
        self.wait()
        self._moments.tensors.clear()  # Room for the model that is read back.
        self._is_held = False
        self._copy(whole_weights(self.accelerator, self.model), self._weights)
        inner = unwrap(self.model)

        def fill(staging: Path) -> None:
            check_free_space(target, self._weights.count_bytes())
            tokenizer.save_pretrained(staging)
            (staging / "README.md").write_text(model_card, encoding="utf-8")
            if has_adapter(inner):
                save_adapter(inner, self._weights.tensors, staging)
                return
            inner.save_pretrained(staging, state_dict=dict(self._weights.tensors))
            dtype = next(each.dtype for each in self._weights.tensors.values() if each.is_floating_point())
            again = type(inner).from_pretrained(staging, dtype=dtype).state_dict()
            for name, tensor in self._weights.tensors.items():
                if name not in again or not torch.equal(again[name], tensor):
                    raise Fault(f"{name} differs from the trained weights when read back")

        self._agree(publish(target, fill) if self.accelerator.is_main_process else None)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _agree(self, problem: str | None) -> None:
        """Raise rank 0's problem, if there is one, on every rank."""
        agreed = ask_main_process(lambda: problem)
        if agreed is not None:
            raise Fault(agreed)

    def _copy(self, tensors: NamedTensors, target: HostCopy) -> None:
        """Take part in gathering each tensor, and keep it on rank 0."""
        for name, tensor in tensors:
            if self.accelerator.is_main_process:
                target.store(name, tensor)

    def _write(self, target: Path, progress: str, best: Path | None, is_best: bool) -> None:
        def fill(staging: Path) -> None:
            check_free_space(target, self._weights.count_bytes() + self._moments.count_bytes())
            self._describe(staging)
            _save_tensors(self._weights.tensors, staging / WEIGHTS_FILE)
            _save_tensors(self._moments.tensors, staging / MOMENTS_FILE)
            (staging / PROGRESS_FILE).write_text(progress, encoding="utf-8")
            write_manifest(staging)

        self._problem = publish(target, fill)
        if self._problem is None:
            try:
                if is_best:
                    link_best(self.run, target)
                self._remove_old(best)
            except OSError as error:
                self._problem = f"old checkpoints in {self.run.checkpoints} could not be removed: {error}"

    def _describe(self, staging: Path) -> None:
        """Config and tokenizer never change: they are made once."""
        if self._description is None:
            self.save_description(staging)
            self._description = {path.name: path.read_bytes() for path in staging.iterdir() if path.is_file()}
        for name, content in self._description.items():
            (staging / name).write_bytes(content)

    def _remove_old(self, best: Path | None) -> None:
        """Keep the newest checkpoints and the best one. It runs after the newest is complete."""
        if self.save_total_limit is None:
            return
        for old in self.run.list_checkpoints()[: -self.save_total_limit]:
            if old != best:
                remove(old)


def _save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file, and compare each tensor with what is read back, bit for bit."""
    save_file(tensors, path, {"format": "pt"})
    sync(path)
    with safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise Fault(f"{name} differs from what was written when read back")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)  # As numbers, NaN differs from itself.
