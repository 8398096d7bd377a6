"""samples.jsonl: what the model makes of the same few validation examples at each evaluation."""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate import Accelerator

from onecurve.training.atomic_files import write_atomically
from onecurve.training.data.columns import Examples
from onecurve.training.models import attention
from onecurve.training.parallel.states import is_sharded, unwrap
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks.base import Task


def write_samples(
    accelerator: Accelerator,
    model: torch.nn.Module,
    task: Task,
    examples: Examples,
    processor: Any,
    run: RunDirectory,
    step: int,
) -> None:
    """Let the model continue what the task gives it, on all processes alike, and keep it on the main one.

    Lines of this step or later ones, which a resumed run makes again, are replaced.
    """
    if not task.num_samples:
        return
    inner = unwrap(model)
    model.eval()
    try:
        with attention.of_transformers(inner):
            samples = task.sample(inner, examples, processor, is_sharded(accelerator))
    finally:
        model.train()
    if not samples or not accelerator.is_main_process:
        return
    _write(run, [*_read(run, step - 1), *({"step": step, **sample} for sample in samples)])


def cut_back(run: RunDirectory, step: int) -> None:
    """Drop the samples of steps that a run resumed after `step` makes again; all of them where it starts anew."""
    if run.samples.exists():
        _write(run, _read(run, step if step else -1))


def _read(run: RunDirectory, last_step: int) -> list[dict[str, Any]]:
    lines = run.samples.read_text(encoding="utf-8").splitlines() if run.samples.exists() else []
    return [line for line in map(json.loads, lines) if line["step"] <= last_step]


def _write(run: RunDirectory, lines: list[dict[str, Any]]) -> None:
    write_atomically(run.samples, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
