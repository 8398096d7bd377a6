"""Checkpoints, and a writer of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from onecurve.training.parallel.accelerator import forget_state
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.manifest import write_manifest
from onecurve.training.recovery.milestones import Progress
from onecurve.training.run_directory import RunDirectory


def make_checkpoint(folder: Path, step: int = 5) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (path / "optimizer.safetensors").write_bytes(b"moments" * 100)
    (path / "progress.json").write_text(json.dumps(Progress(step).to_dict()))
    write_manifest(path)
    return path


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CheckpointWriter]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    yield CheckpointWriter(accelerator, model, optimizer, scheduler, RunDirectory(tmp_path / "run"), 2)
    forget_state()


def save(writer: CheckpointWriter, progress: Progress, is_best: bool = False) -> None:
    """Save, and wait until it is written."""
    writer.save(progress, is_best)
    writer.wait()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
