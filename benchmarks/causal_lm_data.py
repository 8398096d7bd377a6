"""What benchmarks/causal_lm.py trains on: SmolLM2-135M, dialogues and long documents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed_data import DEMO, FOLDER, ROOT

CHAT = ROOT / "build" / "demo-chat"


@dataclass(frozen=True)
class Workload:
    """What is trained in one table.

    Attributes:
        title: a heading.
        keys: of the recipe: data and targets.
        train_batch_size: examples of a step, for everyone; where TRL packs, as many tokens as these have on average.
        micro_batch_size: examples that TRL puts through the model at once, padded; `padding_free_size` without padding.
        packed_length: tokens of a row of TRL's packing; none of the examples is longer.
        micro_batch_tokens: those of Onecurve.
        steps: of a turn.
        rounds: turns of each way.
    """

    name: str
    title: str
    keys: dict[str, str]
    train_batch_size: int
    micro_batch_size: int
    padding_free_size: int
    packed_length: int
    micro_batch_tokens: int
    steps: int
    rounds: int

    @property
    def recipe(self) -> dict[str, str]:
        """Recipe keys of model and data; documents are written if they are not there."""
        model = str(_build_tiny() if self.name == "quick" else CHAT / "model")
        return {"task": "causal_lm", "model_name_or_path": model, **self.keys, "max_eval_samples": "1"}


_DIALOGUES = {
    "train_file": str(CHAT / "train.jsonl"),
    "validation_file": str(CHAT / "validation.jsonl"),
    "messages_column": "messages",
    "assistant_only_loss": "true",
    "max_length": "128",
}
# Texts from a headline of a few sentences to a long report; what is cut has the length of the longest.
_DOCUMENTS = {
    "train_file": str(DEMO / "train.jsonl"),
    "validation_file": str(DEMO / "validation.jsonl"),
    "text_column": "text",
    "max_length": "1024",
}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "dialogues", "Dialogues, the assistant's part learned, 16 a step", _DIALOGUES, 16, 16, 4, 256, 1024, 1, 3
        ),
        Workload("documents", "BBC news cut to 1,024 tokens, 4 a step", _DOCUMENTS, 4, 2, 1, 1024, 2048, 1, 3),
        Workload("quick", "Dialogues and a tiny model, 16 a step", _DIALOGUES, 16, 16, 4, 256, 1024, 2, 2),
    )
}


def _build_tiny() -> Path:
    """A tiny model of random weights with the real model's tokenizer."""
    folder = FOLDER / "models" / "tiny_decoder"
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(CHAT / "model")
        torch.manual_seed(0)
        config = json.loads((CHAT / "model" / "config.json").read_text(encoding="utf-8"))
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")}
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM(LlamaConfig(**ends, **sizes)).save_pretrained(folder)
    return folder
