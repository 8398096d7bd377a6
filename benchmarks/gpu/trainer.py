"""A causal LM trained by transformers.Trainer at its best: bf16, fused AdamW, SDPA but cuDNN's, batches of like length.

    python -m benchmarks.gpu.trainer REQUEST.json ANSWER.json

The request is a recipe of plain texts, the answer tokens_per_second without padding, padding as a share of all places, and
peak_bytes (None without CUDA).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

# The first steps set up what stays.
STEPS_BEFORE = 4


class Clock(TrainerCallback):
    """Counts the tokens of the steps that are timed."""

    def __init__(self) -> None:
        self.tokens, self.places, self.started, self.seconds = torch.zeros((), dtype=torch.int64), 0, 0.0, 0.0

    def count(self, batch: Mapping[str, Any]) -> None:
        """A micro-batch is on the device, where its tokens are added up: to read them here would make the host wait."""
        tokens = batch["attention_mask"].sum()
        self.tokens = self.tokens.to(tokens.device) + tokens
        self.places += batch["attention_mask"].numel()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **others: object) -> None:
        """Time from the last step that does not count to the last."""
        if state.global_step in (STEPS_BEFORE, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if state.global_step == STEPS_BEFORE:
                self.started, self.places = time.perf_counter(), 0
                self.tokens = torch.zeros_like(self.tokens)
            else:
                self.seconds = time.perf_counter() - self.started


class TimedTrainer(Trainer):
    """Trainer whose micro-batches are counted."""

    clock: Clock

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """The micro-batches of a step, which accelerate's loader has sent to the device."""
        samples, count = super().get_batch_samples(*arguments, **options)
        for batch in samples:
            self.clock.count(batch)
        return samples, count


def train(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Train as many steps as the recipe says, on its texts, with its batch."""
    tokenizer = AutoTokenizer.from_pretrained(recipe["model_name_or_path"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = Path(recipe["train_file"]).read_text(encoding="utf-8").splitlines()
    end = [tokenizer.eos_token_id]
    rows = [
        {"input_ids": tokenizer(json.loads(line)["text"])["input_ids"][: recipe["max_length"] - 1] + end}
        for line in lines
    ]
    # In float32, as a recipe's model is: autocast computes in bf16.
    model = AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"], dtype=torch.float32)
    has_cuda = torch.cuda.is_available()
    torch.backends.cuda.enable_cudnn_sdp(False)  # Built anew for each length of a batch.
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=recipe["per_device_batch_size"],
            gradient_accumulation_steps=recipe["train_batch_size"] // recipe["per_device_batch_size"],
            max_steps=recipe["max_train_steps"],
            bf16=has_cuda,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not has_cuda,
            dataloader_pin_memory=has_cuda,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = TimedTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]
        )
        trainer.clock = clock
        trainer.train()
    return {
        "tokens_per_second": int(clock.tokens) / clock.seconds,
        "padding": 1 - int(clock.tokens) / clock.places,
        "peak_bytes": torch.cuda.max_memory_allocated() if has_cuda else None,
    }


def main(arguments: Sequence[str]) -> None:
    """Train what is asked for."""
    found = train(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    Path(arguments[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
