"""A classifier that reads only the first token needs only that token from the last layer.

The heads of BERT, models like it, and DistilBERT read the first token only. What the last layer computes for the other
tokens is never used: their queries, attention and feed-forward network, ten twelfths of the layer. Without it, logits and
gradients stay the same (tests/training/models/test_last_layer.py). The saved model is a plain transformers model.
"""

from __future__ import annotations

import sys
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onecurve.training.architectures import FIRST_TOKEN_CLASSIFIERS
from onecurve.training.models.matrix_attention import ATTENTION

# Their code is copied from BERT: the layers have the same parts, and a cross-attention with the same parameters, which takes
# its queries from one tensor, and its keys and values from another.
_BERT_FAMILIES = ("Bert", "Camembert", "Electra", "Roberta", "XLMRoberta")

# These accept one query for many keys; the masks of others need as many queries as keys.
_ATTENTIONS = ("eager", "sdpa", ATTENTION)


def install(model: torch.nn.Module) -> bool:
    """Make the last layer compute only the first token, if the model's head reads no other.

    Call it after the model's attention is chosen, and before the model is prepared.

    Returns:
        Whether the layer was changed.
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
    # Look the module up now: FSDP2 replaces the layer's class by one of another module.
    models: Any = sys.modules[type(layer).__module__]
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
        mask = None if attention_mask is None else attention_mask[:, :, :1]  # The rows of the first query.
        return compute(layer, hidden_states[:, :1], hidden_states, mask)

    layer.forward = MethodType(forward, layer)
    return True


def _compute_bert(
    cross_attention: Any, layer: Any, first: torch.Tensor, every: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The layer's output [examples, 1, hidden size] for the first token.

    Args:
        first: [examples, 1, hidden size], the first token.
        every: [examples, length, hidden size], all tokens.
        mask: [examples, heads or 1, 1, length].
    """
    context, _ = cross_attention.forward(layer.attention.self, first, every, mask)
    return layer.feed_forward_chunk(layer.attention.output(context, first))  # type: ignore[no-any-return]


def _compute_distilbert(
    eager_attention: Any, layer: Any, first: torch.Tensor, every: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """As `_compute_bert`. DistilBERT has no cross-attention, so this repeats its self-attention for two tensors."""
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
