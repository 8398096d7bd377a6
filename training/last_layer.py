"""A classifier that reads one token needs no more than that token from its last layer.

The heads of BERT and its kin look at the first token alone. What the last layer computes of the others is thrown away: their
queries, their attention, their feed-forward network, ten twelfths of the layer. Left out, logits and gradients stay what they
were (tests/training/test_last_layer.py); what is saved is a plain transformers model.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch

from training.cpu_dropout import ATTENTION

# Copies of one code: their layers have the same parts, and a cross-attention of the same parameters, whose queries come from
# one tensor and whose keys and values from another.
FAMILIES = ("Bert", "Camembert", "Electra", "Roberta", "XLMRoberta")

# These take one query for many keys; others build masks for as many of both.
_ATTENTIONS = ("eager", "sdpa", ATTENTION)


def install(model: torch.nn.Module) -> bool:
    """Let the last layer compute the first token only, where the model's head reads no other.

    For the model as it was loaded, after its attention was chosen and before it is prepared.

    Returns:
        Whether it does from now on.
    """
    family = type(model).__name__.removesuffix("ForSequenceClassification")
    if family not in FAMILIES or not type(model).__module__.startswith("transformers.models."):
        return False
    config: Any = model.config
    if config.is_decoder or config._attn_implementation not in _ATTENTIONS:
        return False
    base: Any = model.base_model
    layer = base.encoder.layer[-1]
    cross_attention: Any = getattr(sys.modules[type(layer).__module__], f"{family}CrossAttention")

    def forward(
        layer: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *others: None,
        **more: Any,
    ) -> torch.Tensor:
        """[examples, length, hidden size] to [examples, 1, hidden size]."""
        first = hidden_states[:, :1]
        mask = None if attention_mask is None else attention_mask[:, :, :1]  # Of the first query.
        context, _ = cross_attention.forward(layer.attention.self, first, hidden_states, mask)
        return layer.feed_forward_chunk(layer.attention.output(context, first))  # type: ignore[no-any-return]

    layer.forward = MethodType(forward, layer)
    return True


__all__ = ["FAMILIES", "install"]
