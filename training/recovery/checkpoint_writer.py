"""Writes checkpoints, while the training continues, and the final model.

Training waits only while the state is copied to host memory: each tensor is kept by one process, to which the others send
their part, so that none holds more than its share of the state and one tensor; where the training lies in host memory, pieces
of that share are written meanwhile (piece_writer.py). A thread of each process writes what it keeps and reads it back; that of
rank 0 publishes the checkpoint when all have done so.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from onecurve.training.errors import Fault
from onecurve.training.parallel.agreement import ask_main_process, raise_together
from onecurve.training.parallel.loss_scale import read_loss_scale
from onecurve.training.parallel.states import (
    count_checkpoint_bytes,
    count_updates,
    lies_in_host_memory,
    list_moments,
    list_weights,
    unwrap,
)
from onecurve.training.recovery.checkpoints import find_checkpoint
from onecurve.training.recovery.dealing import Dealing
from onecurve.training.recovery.final_model import choose_writers, group_converted, write_final
from onecurve.training.recovery.manifest import write_manifest
from onecurve.training.recovery.milestones import Progress
from onecurve.training.recovery.parts import collect_receipts, write_indexes, write_part
from onecurve.training.recovery.piece_writer import PieceWriter
from onecurve.training.recovery.publishing import begin, describe_failure, discard, finish, link_best, remove
from onecurve.training.recovery.room import check_free_space
from onecurve.training.recovery.state_copy import StateCopy
from onecurve.training.run_directory import MOMENTS_FILE, PIECE_BYTES, PROGRESS_FILE, WEIGHTS_FILE, RunDirectory
from onecurve.training.work_progress import following_files

# How long rank 0 waits, at the end of a training that failed, for the parts of processes that may have died: at least this,
# and twice as long as its own part took.
_GRACE_SECONDS = 10.0


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run, and removes old ones over `save_total_limit`.

    Attributes:
        save_description: writes what makes a checkpoint a model that `from_pretrained` loads: its config and processor.
        writers: ranks that write; all, unless some do not see the run directory.
        say: prints how far a file is that the training waits for.

    Leaving it as a context waits for a write in progress, however the training ended.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    scheduler: Any
    run: RunDirectory
    save_total_limit: int | None
    save_description: Callable[[Path], None] = lambda folder: None
    writers: tuple[int, ...] = ()
    say: Callable[[str], None] = lambda line: None
    _copy: StateCopy = field(init=False)
    _thread: threading.Thread | None = None
    _part_is_done: threading.Event = field(default_factory=threading.Event)
    _give_up: threading.Event = field(default_factory=threading.Event)
    _part_seconds: float = 0.0
    _staging: Path | None = None
    _pieces: PieceWriter | None = None
    _problem: str | None = None
    _is_held: bool = False
    _description: dict[str, bytes] | None = None

    def __post_init__(self) -> None:
        self.writers = self.writers or tuple(range(self.accelerator.num_processes))
        self._copy = StateCopy(self.accelerator.process_index)

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Copy the state of all ranks, and start to write it as checkpoints/step_N; `best` will link to it if it is best.

        Returns after the copy: the training may continue and change its weights.

        Raises:
            Fault: on every rank, if the previous checkpoint could not be written.
        """
        self.hold(progress)
        target = self.run.checkpoint(progress.step)
        if self._is_held and self._pieces is None:
            self._begin(target, sum(self._copy.dealing.num_bytes.values()))
        self._is_held = False
        if (staging := self._staging) is None:
            return  # The next steps tell of the problem.
        best = None if progress.best_step is None else self.run.checkpoint(progress.best_step)
        publish = partial(self._publish, staging, target, json.dumps(progress.to_dict()), best, is_best)
        self._part_is_done.clear()
        self._give_up.clear()
        # Not a daemon thread: the interpreter waits for it before it exits.
        self._thread = threading.Thread(target=self._write, args=(staging, target, publish), name="checkpoint")
        self._thread.start()

    def hold(self, progress: Progress) -> None:
        """Copy the state of all ranks now: the next `save` writes it, whatever the model has become by then.

        Raises:
            Fault: on every rank, if the previous checkpoint could not be written.
        """
        self.wait()
        if self._is_held:
            return
        if len(self.writers) > 1 and lies_in_host_memory(self.accelerator, self.model):
            self._begin(self.run.checkpoint(progress.step), count_checkpoint_bytes(self.model))
            if self._staging is None:
                return
            self._pieces = PieceWriter(self._staging)
        progress.scheduler = self.scheduler.state_dict()
        progress.optimizer_step = count_updates(self.optimizer)
        progress.loss_scale = read_loss_scale(self.accelerator, self.optimizer)
        self._copy.dealing = Dealing(self.writers, piece_bytes=None if self._pieces is None else PIECE_BYTES)
        self._copy.take(WEIGHTS_FILE, list_weights(self.accelerator, self.model), self._pieces)
        self._copy.take(MOMENTS_FILE, list_moments(self.accelerator, self.model, self.optimizer), self._pieces)
        self._is_held = True

    def has_failed(self) -> bool:
        """Whether this rank knows of a checkpoint that could not be written."""
        return self._problem is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is complete under its name. Every rank must call it.

        Raises:
            Fault: on every rank, if one could not write it. Earlier checkpoints are intact.
        """
        if self._thread is not None:
            with self._following("saving the checkpoint", MOMENTS_FILE):
                self._part_is_done.wait()
        try:
            raise_together(self._problem)
            self._join()  # Every part is written, so rank 0 does not wait for any.
            raise_together(self._problem)
        except Fault:
            self._give_up.set()
            self._join()
            self._discard()
            raise

    def describe_last(self) -> str:
        """The last good checkpoint, in a sentence."""
        self._join(gives_up=True)
        last, _ = find_checkpoint(self.run.checkpoints)
        return "There is no checkpoint yet" if last is None else f"The last good checkpoint is {last}"

    def save_final(self, processor: Any, model_card: str, target: Path) -> None:
        """Write final/ as save_pretrained does, and compare the weights that are read back with the trained ones.

        Large models are written by several processes, each its share.

        Raises:
            Fault: on every rank: a checkpoint or final/ could not be written, or weights differ when read back.
        """
        self.wait()
        self._drop_held()
        self._copy.clear()  # Room for the model that is read back; and other processes may keep weights.

        def add_more(staging: Path) -> None:
            processor.save_pretrained(staging)
            (staging / "README.md").write_text(model_card, encoding="utf-8")

        inner = unwrap(self.model)
        self._copy.dealing = Dealing(choose_writers(inner, self.writers), group_converted(inner))
        self._copy.take(WEIGHTS_FILE, list_weights(self.accelerator, self.model))
        self._begin(target, sum(self._copy.dealing.num_bytes.values()))
        raise_together(self._problem)
        staging = self._staging
        assert staging is not None  # Or there is a problem.
        try:
            with self._following(f"saving {target.name}/"):
                weights = self._copy.tensors(WEIGHTS_FILE)
                write_final(self.accelerator, inner, weights, self._copy.dealing, staging, target, add_more)
        except Fault:
            self._discard()
            raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._join(gives_up=True)
        self._discard()

    def _begin(self, target: Path, num_bytes: int) -> None:
        """Let rank 0 make the staging folder; where it can't, there is none, and a problem."""

        def begin_here() -> tuple[Path | None, str | None]:
            try:
                check_free_space(target, num_bytes)
                return begin(target), None
            except Exception as error:
                return None, describe_failure(target, error)

        self._staging, self._problem = ask_main_process(begin_here)

    def _following(self, what: str, *more_files: str) -> contextlib.AbstractContextManager[None]:
        """Say how far the staging folder is, on the main process."""
        num_bytes = sum(self._copy.dealing.num_bytes.get(file, 0) for file in (WEIGHTS_FILE, *more_files))
        folder = self._staging if self.accelerator.is_main_process else None
        return following_files(what, folder, num_bytes, self.say)

    def _join(self, gives_up: bool = False) -> None:
        """Wait for this rank's thread.

        Args:
            gives_up: other ranks may have died: do not wait for their parts for ever.
        """
        if self._thread is None:
            return
        if gives_up:
            self._part_is_done.wait()
            self._thread.join(max(_GRACE_SECONDS, 2 * self._part_seconds))
            self._give_up.set()
        self._thread.join()
        self._thread = None

    def _drop_held(self) -> None:
        """Drop a state that was held and need not be saved any more."""
        if self._is_held and self._pieces is not None:
            with contextlib.suppress(Exception):
                self._pieces.finish()
            self._discard()
        self._pieces, self._is_held = None, False

    def _discard(self) -> None:
        """Remove what was not published."""
        if self.accelerator.is_main_process:
            discard(self._staging)

    def _write(self, staging: Path, target: Path, publish: Callable[[], None]) -> None:
        """This rank's part; and on rank 0 the rest, when all parts are there."""
        started = time.monotonic()
        part = self._copy.dealing.find_part(self._copy.rank)
        try:
            pieces, self._pieces = self._pieces, None
            written = [] if pieces is None else pieces.finish()
            if part is not None:
                write_part(staging, part, self._copy.group_by_file(), written)
            if written:  # Else memory is used again for the next.
                self._copy.clear()
            self._part_seconds = time.monotonic() - started
            self._part_is_done.set()
            if self.accelerator.is_main_process:
                publish()
        except Exception as error:  # safetensors has its own exception for a full disk.
            self._problem = describe_failure(target, error)
        finally:
            self._part_is_done.set()

    def _publish(self, staging: Path, target: Path, progress: str, best: Path | None, is_best: bool) -> None:
        facts = collect_receipts(staging, len(self._copy.dealing.writers), self._give_up)
        if facts is None:
            return
        self._describe(staging)
        write_indexes(staging, self._copy.dealing)
        (staging / PROGRESS_FILE).write_text(progress, encoding="utf-8")
        write_manifest(staging, facts)
        finish(staging, target)
        try:
            if is_best:
                link_best(self.run, target)
            self._remove_old(best)
        except OSError as error:
            self._problem = f"old checkpoints in {self.run.checkpoints} could not be removed: {error}"

    def _describe(self, staging: Path) -> None:
        """Config and tokenizer never change: they are made once."""
        if self._description is None:
            before = set(staging.iterdir())
            self.save_description(staging)
            made = (path for path in staging.iterdir() if path not in before and path.is_file())
            self._description = {path.name: path.read_bytes() for path in made}
        for name, content in self._description.items():
            (staging / name).write_bytes(content)

    def _remove_old(self, best: Path | None) -> None:
        """Keep the newest checkpoints and the best one. It runs after the newest is complete."""
        if self.save_total_limit is None:
            return
        for old in self.run.list_checkpoints()[: -self.save_total_limit]:
            if old != best:
                remove(old)
