"""A small training on real text, for tests and programs: its data, a tiny model with random weights, its settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "build" / "demo"

# A training is a pure function of its recipe; these make it small.
TINY = {
    "max_length": 64,
    "train_batch_size": 16,
    "per_device_batch_size": 8,
    "learning_rate": 1e-3,
    "max_train_steps": 8,
    "dropout": 0.0,
    "allow_slow_bf16": True,  # What is tested is what a processor computes, not how fast.
}


@dataclass(frozen=True)
class Run:
    """What a training left behind."""

    exit_code: int
    stdout: str
    stderr: str
    path: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of steps."""
        return [line for line in self.lines if line["event"] == "train"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of evaluations."""
        return [line for line in self.lines if line["event"] == "eval"]

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [line["loss"] for line in self.steps]

    def read(self, name: str) -> Any:
        """A JSON file of the run directory."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def to_flags(settings: Mapping[str, Any]) -> list[str]:
    """Recipe keys as command line flags."""
    switches = ["--eval_only"] if settings.get("eval_only") else []
    return switches + [
        word
        for key, value in settings.items()
        if key != "eval_only"
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def build_tiny_model(folder: Path) -> Path:
    """Write a BERT with the commonest pieces of the real tokenizer and two layers of random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> int:
    """Write the demo's tokenizer without its rarer pieces, and return how many it has left.

    With all of them a tiny model's embedding has fifty times as many weights as its layers, and takes most of its time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, num_pieces = DEMO / "model", 5_000
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)
    described = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = described["model"]["vocab"]  # BERT's: special ones, characters, then words by how common they are.
    described["model"]["vocab"] = {piece: number for piece, number in vocabulary.items() if number < num_pieces}
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    pieces = (source / "vocab.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "vocab.txt").write_text("".join(pieces[:num_pieces]), encoding="utf-8")
    return num_pieces


def build_news(folder: Path) -> Path:
    """Write train.jsonl (203 articles) and validation.jsonl (61), of all five classes and very different lengths."""
    for split, count in (("train", 203), ("validation", 61)):
        rows = (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = [json.loads(row) for row in rows[:: len(rows) // count][:count]]
        for number, row in enumerate(chosen):  # From one word to all of them.
            words = row["text"].split()
            row["text"] = " ".join(words[: 3 + number * 7 % 60])
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n", encoding="utf-8")
    return folder
