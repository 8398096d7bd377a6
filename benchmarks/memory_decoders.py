"""Predicted against measured memory of steps of language models: logits, chunks of tokens, activations of decoders.

    python -m benchmarks.memory_decoders            writes benchmarks/memory_decoders.md
    python -m benchmarks.memory_decoders --measure 0    one row, in this process

As benchmarks/memory.py for one process: growth of the resident set over what was there before the model, while steps 3 and 4
run, with the attention, the dropout and the loss of a training on a CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.memory import measure_steps, warm_up
from onecurve.launcher.facts.shape import build_shape
from onecurve.launcher.planning.memory import MemoryEstimate, estimate_memory
from onecurve.launcher.planning.work import build_work
from onecurve.launcher.units import MIB
from onecurve.training.tasks.causal_lm_recipe import CausalLMRecipe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "benchmarks" / "memory_decoders.md"

_LLAMA = {
    "vocab_size": 49_152, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, tied": ("llama", _LLAMA),
    "Llama, deep": ("llama", {**_LLAMA, "vocab_size": 8_000, "num_hidden_layers": 12, "tie_word_embeddings": False}),
    "Qwen3, 151,936 words": (
        "qwen3",
        {**_LLAMA, "vocab_size": 151_936, "hidden_size": 256, "num_hidden_layers": 4, "head_dim": 64},
    ),
    "GPT-2, dropout": ("gpt2", {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 1024, "vocab_size": 50_257}),
}


@dataclass(frozen=True)
class Case:
    """A model, examples and tokens of a micro-batch, and what its recipe says besides."""

    model: str
    num_examples: int
    length: int
    num_micro_batches: int = 1
    keys: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """The cells of a row that say what was measured."""
        shown = [f"{key} {value}" for key, value in self.keys.items()]
        shown += [f"{self.num_micro_batches} micro-batches"] * (self.num_micro_batches > 1)
        return f"| {self.model} | {self.num_examples} x {self.length} | {', '.join(shown) or '-'} |"

    def build_recipe(self) -> CausalLMRecipe:
        """A recipe whose steps are those that are measured."""
        return CausalLMRecipe(
            task="causal_lm",
            model_name_or_path="none",
            max_length=self.length,
            per_device_batch_size=self.num_examples,
            train_batch_size=self.num_examples * self.num_micro_batches,
            **self.keys,
        )


CASES = (
    Case("Llama, tied", 4, 256),
    Case("Llama, tied", 2, 512, 2, {"loss_chunk_tokens": 64}),
    Case("Llama, tied", 4, 256, 1, {"mixed_precision": "bf16"}),
    Case("Llama, tied", 1, 1024, 1, {"mixed_precision": "bf16"}),
    Case("Llama, deep", 4, 256),
    Case("Llama, deep", 4, 256, 1, {"gradient_checkpointing": True}),
    Case("Qwen3, 151,936 words", 4, 256),
    Case("GPT-2, dropout", 4, 256),
)


def predict(case: Case) -> MemoryEstimate:
    """The launcher's arithmetic for one case."""
    model_type, settings = _MODELS[case.model]
    shape = build_shape({"model_type": model_type, **settings}, predicts_tokens=True)
    return estimate_memory(shape, "one process", build_work(case.build_recipe(), shape, "cpu", case.length, 1), 1)


def measure(case: Case) -> int:
    """Peak bytes of one case, in this process."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from onecurve.training.data.plan import Placement
    from onecurve.training.models import example_dropout, example_masks
    from onecurve.training.models.packing import prepare_attention
    from onecurve.training.tasks.token_losses import token_losses

    base = warm_up(num_threads=1)
    model_type, settings = _MODELS[case.model]
    recipe = case.build_recipe()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).train()
    if recipe.gradient_checkpointing:
        keywords = {"use_reentrant": False, "context_fn": example_masks.checkpoint_contexts}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    example_dropout.install(model, recipe, torch.device("cpu"))
    prepare_attention(model, recipe)
    tokens = torch.randint(0, settings["vocab_size"], (case.num_examples, case.length))

    placement = Placement(np.full(case.num_examples, case.length), frozenset({case.length}))

    def compute_loss() -> torch.Tensor:
        example_masks.begin(example_masks.ExampleMasks(0, 0, range(case.num_examples), placement))
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": None}
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed_precision == "bf16"):
            found = token_losses(model, inputs, tokens, recipe.loss_chunk_tokens)
        return found.losses.sum() / tokens.numel()

    return measure_steps(model, compute_loss, case.num_micro_batches) - base


def measure_apart(number: int) -> int:
    """The same in a fresh process whose allocator returns every block above 64 KiB."""
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    words = [sys.executable, "-m", "benchmarks.memory_decoders", "--measure", str(number)]
    result = subprocess.run(words, env=variables, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(result.stdout.strip().splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, help="the number of a row; prints its bytes")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        print(measure(CASES[options.measure]))
        return
    lines = [
        "# Memory of language models: predicted and measured",
        "",
        "Written by `python -m benchmarks.memory_decoders`. MiB on one process, AdamW, float32 unless the third column says",
        "otherwise: growth of the resident set on a CPU, with the attention, the dropout and the loss of a training there.",
        "",
        "| model | examples x tokens | changed | predicted | measured | off by |",
        "|---|---|---|---|---|---|",
    ]
    for number, case in enumerate(CASES):
        predicted, measured = predict(case).peak, measure_apart(number)
        lines.append(
            f"{case.describe()} {predicted / MIB:,.0f} | {measured / MIB:,.0f} | {predicted / measured - 1:+.1%} |"
        )
        print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
