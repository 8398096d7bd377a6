"""Tiny decoders of several families, with random weights large enough that each token matters to those after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

_SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_OF_GPT2 = {
    "vocab_size": 101,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

# Families that pack, with what is special of each: grouped heads, normed queries, windows, capped scores, sinks, positions
# that are learned.
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GROUPED, **_WINDOWS, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, **_WINDOWS, head_dim=8, attn_logit_softcapping=2.0),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(**_OF_GPT2, **_NO_DROPOUT, pad_token_id=0),
    "phi": lambda: transformers.PhiConfig(**_SHAPE),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_GROUPED, **_WINDOWS, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    ),
}


def build_decoder(config: Any) -> Any:
    """A causal language model of a config, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model
