"""Tiny decoders with random weights, one for each family, and a byte-level tokenizer of real text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.trainings import DEMO

END = "<|endoftext|>"
SPECIAL_TOKENS = (END, "<|im_start|>", "<|im_end|>", "<s>", "<|header|>", "<|turn_end|>", "<pad>")

VOCABULARY = 512
MAX_POSITIONS = 256


def build_tokenizer(folder: Path, chat_template: str | None = None) -> Path:
    """Write a byte-level BPE tokenizer, trained on the demo's texts, that adds no token of its own."""
    from transformers import PreTrainedTokenizerFast

    backend = train_tokenizer(SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, chat_template=chat_template)
    tokenizer.save_pretrained(folder)
    return folder


def train_tokenizer(special_tokens: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of the tokenizers package, of the demo's texts; special tokens have the first numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rows = (DEMO / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.loads(row)["text"] for row in rows], trainer)
    return backend


_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}

# By family: the class of its config, and what its config has beside vocabulary and special tokens.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_SHAPE, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**_SHAPE, "head_dim": 8, "sliding_window": 8}),
    "mistral": ("MistralConfig", {**_SHAPE, "sliding_window": 8}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}),
    "phi": ("PhiConfig", _SHAPE),
    "mixtral": ("MixtralConfig", {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def build_decoder(
    folder: Path,
    family: str = "llama",
    chat_template: str | None = None,
    initializer_range: float = 0.02,
    shape: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tiny causal language model with random weights, and its tokenizer.

    Args:
        initializer_range: deviation of the weights; large ones let each token depend on all before it.
        shape: values of its config in place of the family's.
    """
    import torch
    import transformers

    build_tokenizer(folder, chat_template)
    torch.manual_seed(0)
    name, own = FAMILIES[family]
    config = getattr(transformers, name)(
        vocab_size=VOCABULARY,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        initializer_range=initializer_range,
        **{**own, **(shape or {})},
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
