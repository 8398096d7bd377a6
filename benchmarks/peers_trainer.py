"""transformers.Trainer and trl.SFTTrainer on the first global batch of lessons, on the processes that were launched.

    python -m benchmarks.peers_trainer FOLDER texts completions        started by benchmarks.peers

Writes FOLDER/peers_PROCESSES.json: of each lesson, way and number of micro-batches the loss and the gradient norm.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.conformance_curve import Curve
from benchmarks.conformance_peers import build_trainer
from benchmarks.peers import TOPOLOGIES, build_flags
from benchmarks.references_lesson import Lesson, build_lesson
from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.record.console import quiet_third_parties


def train(way: str, lesson: Lesson, accumulation: int) -> list[float]:
    """Loss and gradient norm of one step."""
    curve = Curve()
    build_trainer(way, lesson, accumulation, curve, max_steps=1).train()
    return [curve.losses[0], curve.grad_norms[0]]


def main(folder: Path, lessons: Sequence[str]) -> None:
    """Train every lesson in both ways, with every number of micro-batches."""
    quiet_third_parties()
    num_processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found: dict[str, Any] = {}
    for name in lessons:
        recipe = load_recipe(*parse_arguments(build_flags(name, folder))).recipe
        for way in ("Trainer", "SFTTrainer"):
            for processes, accumulation in TOPOLOGIES:
                if processes == num_processes:
                    torch.manual_seed(0)
                    measured = train(way, build_lesson(recipe), accumulation)
                    found.setdefault(name, {}).setdefault(way, {})[accumulation] = measured
    if rank == 0:
        (folder / f"peers_{num_processes}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
