"""How many layers lie above each parameter, in families that call and order their parts differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from onecurve.training.errors import BadInput
from onecurve.training.models.depths import count_layers_above
from tests.messages import naming

SMALL = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
BERT = {**SMALL, "num_hidden_layers": 3}
SEQ2SEQ = {"vocab_size": 30, "d_model": 8, "decoder_start_token_id": 0}


def build(kind: Any, name: str, **settings: Any) -> torch.nn.Module:
    config = AutoConfig.for_model(name, **settings)
    with torch.device("meta"):
        return kind.from_config(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "name", "settings", "expected"),
    [
        (
            AutoModelForSequenceClassification,
            "bert",
            BERT,
            {
                "classifier.weight": 0,
                "bert.pooler.dense.weight": 0,
                "bert.encoder.layer.2.output.LayerNorm.bias": 1,
                "bert.encoder.layer.0.attention.self.query.weight": 3,
                "bert.embeddings.LayerNorm.weight": 4,
                "bert.embeddings.word_embeddings.weight": 4,
            },
        ),
        (
            AutoModelForSequenceClassification,
            "deberta-v2",
            {**BERT, "relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
            {"deberta.encoder.rel_embeddings.weight": 4, "deberta.encoder.layer.2.output.dense.weight": 1},
        ),
        (
            AutoModelForSequenceClassification,
            "albert",
            {**BERT, "embedding_size": 4},
            {
                "albert.embeddings.word_embeddings.weight": 2,
                "albert.encoder.embedding_hidden_mapping_in.weight": 2,
                "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": 1,
            },
        ),
        (
            AutoModelForCausalLM,
            "llama",
            {**BERT, "num_key_value_heads": 2, "tie_word_embeddings": False},
            {
                "lm_head.weight": 0,
                "model.norm.weight": 0,
                "model.layers.2.mlp.up_proj.weight": 1,
                "model.embed_tokens.weight": 4,
            },
        ),
        (
            AutoModelForCausalLM,
            "gpt2",
            {"vocab_size": 30, "n_embd": 8, "n_head": 2, "n_layer": 2},
            {
                "transformer.wte.weight": 3,  # The output layer is this tensor too.
                "transformer.wpe.weight": 3,
                "transformer.h.1.ln_1.weight": 1,
                "transformer.ln_f.weight": 0,
            },
        ),
        (
            AutoModelForSeq2SeqLM,
            "bart",
            {**SEQ2SEQ, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
            {
                "model.shared.weight": 4,
                "model.encoder.layernorm_embedding.weight": 4,
                "model.encoder.layers.0.fc1.weight": 3,
                "model.decoder.layers.0.fc1.weight": 2,
                "model.decoder.layers.1.fc1.weight": 1,
            },
        ),
        (
            AutoModelForSeq2SeqLM,
            "t5",
            {**SEQ2SEQ, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2},
            {
                "shared.weight": 3,
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 2,
                "encoder.final_layer_norm.weight": 0,
                "decoder.block.1.layer.2.DenseReluDense.wo.weight": 1,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_each_parameter_has_the_number_of_layers_above_it(
    kind: Any, name: str, settings: dict[str, Any], expected: dict[str, int]
) -> None:
    model = build(kind, name, **settings)
    found = count_layers_above(model)
    assert {each: found[each] for each in expected} == expected
    assert found.keys() == dict(model.named_parameters()).keys()


def test_a_mixtures_experts_belong_to_their_layer() -> None:
    settings = {**BERT, "num_key_value_heads": 2, "num_local_experts": 2}
    found = count_layers_above(build(AutoModelForCausalLM, "mixtral", **settings))
    assert {above for name, above in found.items() if ".layers.0." in name} == {3}


def test_a_model_without_layers_is_refused() -> None:
    model = build(AutoModelForSequenceClassification, "bert", **{**BERT, "num_hidden_layers": 0})
    with pytest.raises(BadInput, match=naming("layerwise_lr_decay", type(model).__name__)):
        count_layers_above(model)
