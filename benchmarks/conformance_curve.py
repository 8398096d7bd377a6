"""What every way of training is given by `benchmarks.conformance`, and what it leaves: curves and one evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BATCH_SIZE = 16
TOPOLOGIES = ((1, 1), (1, 4), (2, 1), (2, 4))
"""Processes, and micro-batches of each in a step. The first is what the others are compared with."""

LESSONS: Mapping[str, Mapping[str, str]] = {
    "classifier": {"model_name_or_path": "model"},
    "decoder": {"model_name_or_path": "decoder", "task": "causal_lm", "text_column": "text"},
}

NO_TARGET = -100


@dataclass
class Curve:
    """What came of a training on one topology.

    Attributes:
        losses, grad_norms, rates: of each step.
        eval_loss: of the validation data after the last step, as the way reports it.
        true_eval_loss: of the same weights, one example at a time.
        num_evaluated: predictions that its metrics were computed from.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    eval_loss: float = 0.0
    true_eval_loss: float = 0.0
    num_evaluated: int = 0

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Curve:
        """What `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def name_curve(way: str, lesson: str, num_processes: int, accumulation: int) -> str:
    """The file of a curve."""
    return f"{way}_{lesson}_{num_processes}x{accumulation}.json"


def build_settings(lesson: str, folder: Path, num_steps: int, micro_batch_size: int = BATCH_SIZE) -> dict[str, Any]:
    """The recipe of a lesson: float32, no dropout, the last batch of each epoch uneven (200 = 12 x 16 + 8)."""
    return {
        "train_file": str(folder / "train.jsonl"),
        "validation_file": str(folder / "validation.jsonl"),
        "max_length": 128,
        "train_batch_size": BATCH_SIZE,
        "per_device_batch_size": micro_batch_size,
        "max_train_steps": num_steps,
        "eval_steps": num_steps,
        "learning_rate": 1e-3,
        "dropout": 0.0,
        "resume": "never",
        "output_dir": str(folder / f"onecurve_{lesson}"),
        **LESSONS[lesson],
        "model_name_or_path": str(folder / LESSONS[lesson]["model_name_or_path"]),
    }


def measure_eval_loss(model: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """The loss of some rows by plain transformers, one at a time: over all targets, or over all rows of a classifier."""
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            inputs = {name: torch.tensor([values]) for name, values in row.items() if name != "labels"}
            logits, labels = model(**inputs).logits.double(), torch.tensor([row["labels"]])
            if labels.ndim == 2:  # The next token of each.
                logits, labels = logits[0, :-1], labels[0, 1:]
            total += float(cross_entropy(logits, labels, ignore_index=NO_TARGET, reduction="sum"))
            count += int((labels != NO_TARGET).sum())
    return total / count
