"""A classifier that reads one token needs no more than that token from its last layer.

The heads of BERT, its kin and DistilBERT look at the first token alone. What the last layer computes of the others is thrown
away: their queries, their attention, their feed-forward network, ten twelfths of the layer. Left out, logits and gradients
stay what they were (tests/training/models/test_last_layer.py); what is saved is a plain transformers model.
"""

from __future__ import annotations

import sys
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onecurve.training.architectures import FIRST_TOKEN_CLASSIFIERS
from onecurve.training.models.cpu_dropout import ATTENTION

# Copies of one code: their layers have the same parts, and a cross-attention of the same parameters, whose queries come from
# one tensor and whose keys and values from another.
_BERT_FAMILIES = ("Bert", "Camembert", "Electra", "Roberta", "XLMRoberta")

# These take one query for many keys; others build masks for as many of both.
_ATTENTIONS = ("eager", "sdpa", ATTENTION)


def install(model: torch.nn.Module) -> bool:
    """Let the last layer compute the first token only, where the model's head reads no other.

    For the model as it was loaded, after its attention was chosen and before it is prepared.

    Returns:
        Whether it does from now on.
    """
    family = type(model).__name__.removesuffix("ForSequenceClassification")
    if family not in FIRST_TOKEN_CLASSIFIERS.values() or not type(model).__module__.startswith("transformers.models."):
        return False
    config: Any = model.config
    if getattr(config, "is_decoder", False) or config._attn_implementation not in _ATTENTIONS:
        return False
    base: Any = model.base_model
    is_of_bert = family in _BERT_FAMILIES
    layer = (base.encoder if is_of_bert else base.transformer).layer[-1]
    models: Any = sys.modules[type(layer).__module__]  # Now: FSDP2 gives the layer a class of another module.
    if is_of_bert:
        compute = partial(_compute_bert, getattr(models, f"{family}CrossAttention"))
    else:
        compute = partial(_compute_distilbert, models.eager_attention_forward)

    def forward(
        layer: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *others: None,
        **more: Any,
    ) -> torch.Tensor:
        mask = None if attention_mask is None else attention_mask[:, :, :1]  # Of the first query.
        return compute(layer, hidden_states[:, :1], hidden_states, mask)

    layer.forward = MethodType(forward, layer)
    return True


def _compute_bert(
    cross_attention: Any, layer: Any, first: torch.Tensor, every: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[examples, 1, hidden size] of the first token, [examples, length, hidden size] of all, to the first's output."""
    context, _ = cross_attention.forward(layer.attention.self, first, every, mask)
    return layer.feed_forward_chunk(layer.attention.output(context, first))  # type: ignore[no-any-return]


def _compute_distilbert(
    eager_attention: Any, layer: Any, first: torch.Tensor, every: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """As `_compute_bert`; DistilBERT has no cross-attention, so these are its self-attention's lines for two tensors."""
    attention = layer.attention
    queries, keys, values = (
        project(tokens).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
        for project, tokens in ((attention.q_lin, first), (attention.k_lin, every), (attention.v_lin, every))
    )
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention)
    dropout = attention.dropout.p if attention.training else 0.0
    context, _ = attend(attention, queries, keys, values, mask, dropout=dropout, scaling=attention.scaling)
    attended = layer.sa_layer_norm(attention.out_lin(context.flatten(2)) + first)
    return layer.output_layer_norm(layer.ffn(attended) + attended)  # type: ignore[no-any-return]


__all__ = ["install"]
