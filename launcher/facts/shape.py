"""The numbers of a transformer that memory and compute depend on, read from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onecurve.launcher.errors import UncountableModel, UnreadableModel
from onecurve.launcher.facts.model_files import count_stored_parameters, describe_without_weights, find_config
from onecurve.training.architectures import FIRST_TOKEN_CLASSIFIERS, count_patches, count_positions

_GATED_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "mixtral",
    "modernbert",
)
_DECODER_TYPES = (*_GATED_TYPES[:-1], "gpt2", "gpt_neox", "opt", "phi")
# Families whose config.json says only when output layer and embeddings do not share weights.
_MASKED_TYPES = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "electra",
    "modernbert",
    "albert",
    "mpnet",
)
_TIED_TYPES = ("gpt2", "opt", "gemma", "gemma2", "gemma3_text", *_MASKED_TYPES)
# Outputs of the head: a config.json does not say how many, and their parameters are few beside all others.
_HEAD_OUTPUTS = 2


@dataclass(frozen=True)
class ModelShape:
    """A transformer with a head, in numbers.

    Attributes:
        intermediate_size: of the feed-forward that a token goes through, summed over its experts if there are any.
        num_parameters: all of them, the head included.
        layer_parameters: of one layer.
        idle_parameters: of one layer, those that a token does not use: experts that were not chosen for it.
        is_exact: `num_parameters` was counted, not estimated for a model type that is not known here.
        dropout: of the attention probabilities; above 0 the CPU's attention keeps them.
        knows_activations: whether it is known what a layer keeps for the backward pass; else memory is without that.
        predicts_tokens: whether the head has an output for each word of the vocabulary at each token.
        is_tied: whether such a head has the token embeddings' weights.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocab_size: int
    num_positions: int | None
    is_gated: bool
    is_decoder: bool
    num_parameters: int
    layer_parameters: int
    is_exact: bool
    dropout: float
    idle_parameters: int = 0
    knows_activations: bool = True
    predicts_tokens: bool = False
    is_tied: bool = False

    @property
    def embedding_parameters(self) -> int:
        """Token embeddings: they take memory, but no part in matrix products."""
        return self.vocab_size * self.hidden_size

    @property
    def reads_first_token(self) -> bool:
        """Whether the head reads the first token alone, so that the last layer need not compute the others."""
        return self.model_type in FIRST_TOKEN_CLASSIFIERS and not self.is_decoder and not self.predicts_tokens


def load_shape(model: str, predicts_tokens: bool = False) -> ModelShape:
    """Read a model's shape from its folder, from a config.json, or from the hub's cache on this machine.

    Args:
        predicts_tokens: whether its head is a language model's.

    Raises:
        UnreadableModel: there is no config.json, or it does not describe a transformer.
        UncountableModel: a mixture of experts of an unknown kind, whose weights are not on this machine.
    """
    path = find_config(model)
    if path is None:
        raise UnreadableModel(
            f"model_name_or_path: no config.json for {model!r} on this machine; give a model folder, or download the "
            "model with `onecurve fetch`"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        shape = _build_or_none(config, predicts_tokens)
    except (OSError, ValueError) as error:
        raise UnreadableModel(f"{path} can't be read: {error}") from None
    if shape is not None and shape.is_exact:
        return shape
    counted = count_stored_parameters(path.parent)
    if shape is not None and counted:
        layer = max(0, counted - shape.embedding_parameters) // shape.num_layers
        return replace(shape, num_parameters=counted, layer_parameters=layer, is_exact=True)
    answer = describe_without_weights(path)
    if "problem" not in answer:
        return _build_counted(config, answer)
    if shape is None:
        raise UnreadableModel(f"{path}: not the config of a transformer: {answer['problem']}")
    if (num_experts := count_experts(config)) > 1:
        raise UncountableModel(
            f"{path}: {shape.model_type} mixes {num_experts} experts in a way that Onecurve does not know, so its "
            f"parameters can only be counted from its weights ({answer['problem']}); download them"
        )
    return shape


def _build_or_none(config: Any, predicts_tokens: bool) -> ModelShape | None:
    try:
        return build_shape(config, predicts_tokens=predicts_tokens)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None


def _build_counted(config: Mapping[str, Any], answer: Mapping[str, Any]) -> ModelShape:
    """A shape of a family that the arithmetic does not know, from the model that transformers builds of it."""
    return ModelShape(
        model_type=str(config.get("model_type")),
        intermediate_size=0,
        num_heads=0,
        num_key_value_heads=0,
        head_size=0,
        num_positions=count_positions(config),
        is_gated=False,
        is_decoder=False,
        is_exact=False,
        dropout=0.0,
        knows_activations=False,
        **answer,
    )


def build_shape(
    config: Mapping[str, Any], head_outputs: int = _HEAD_OUTPUTS, predicts_tokens: bool = False
) -> ModelShape:
    """A shape from the content of a config.json.

    Args:
        head_outputs: outputs of the head that training puts on the model.
        predicts_tokens: the head is a language model's instead, with an output for each word.

    Raises:
        KeyError: a number that every transformer needs is missing.
    """
    config = config.get("text_config") or config
    model_type = config["model_type"]

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            if config.get(name) is not None:
                return int(config[name])
        if default is None:
            raise KeyError(names[0])
        return default

    hidden = number("hidden_size", "n_embd", "dim", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads")
    default_intermediate = 4 * hidden if model_type == "gpt2" else None
    values: dict[str, Any] = {
        "model_type": model_type,
        "num_layers": number("num_hidden_layers", "n_layer", "n_layers"),
        "hidden_size": hidden,
        "intermediate_size": number(
            "intermediate_size", "n_inner", "hidden_dim", "ffn_dim", default=default_intermediate
        ),
        "num_heads": heads,
        "num_key_value_heads": number("num_key_value_heads", default=heads),
        "head_size": number("head_dim", default=hidden // heads),
        "vocab_size": 0 if model_type == "vit" else number("vocab_size"),
        "num_positions": count_positions(config),
        "is_gated": model_type in _GATED_TYPES,
        "is_decoder": model_type in _DECODER_TYPES,
        "dropout": _attention_dropout(config),
    }
    is_tied = predicts_tokens and bool(config.get("tie_word_embeddings", model_type in _TIED_TYPES))
    if predicts_tokens:
        head_outputs = 0 if is_tied else values["vocab_size"]
    count = _COUNTS.get(model_type)
    layer, rest = (count or _count_unknown)(config, values, head_outputs)
    if is_tied and model_type in _MASKED_TYPES:  # A norm before the output layer, and its bias.
        rest += 2 * hidden + values["vocab_size"]
    if model_type == "mixtral":
        chosen = int(config["num_experts_per_tok"])
        values["idle_parameters"] = (count_experts(config) - chosen) * 3 * hidden * values["intermediate_size"]
        values["intermediate_size"] *= chosen
    return ModelShape(
        **values,
        num_parameters=values["num_layers"] * layer + rest,
        layer_parameters=layer,
        is_exact=count is not None,
        predicts_tokens=predicts_tokens,
        is_tied=is_tied,
    )


def count_experts(config: Mapping[str, Any]) -> int:
    """Experts in a layer of a mixture of experts; 1 in a plain transformer."""
    config = config.get("text_config") or config
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return max(int(config.get(name) or 1) for name in names)


def _attention_dropout(config: Mapping[str, Any]) -> float:
    for name in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"):
        if config.get(name) is not None:
            return float(config[name])
    return 0.1 if config["model_type"] in ("bert", "roberta", "distilbert", "electra", "gpt2", "xlm-roberta") else 0.0


# Parameters of (one layer, everything else), as the modules of transformers 5 have them; tests compare them with the models.

_Count = Callable[[Mapping[str, Any], Mapping[str, Any], int], tuple[int, int]]


def _plain_layer(hidden: int, intermediate: int) -> int:
    """Four attention projections, two of the feed-forward, all with biases; two norms."""
    return 4 * (hidden * hidden + hidden) + 2 * hidden * intermediate + intermediate + hidden + 4 * hidden


def _count_bert(config: Mapping[str, Any], values: Mapping[str, Any], head_outputs: int) -> tuple[int, int]:
    hidden = values["hidden_size"]
    size = config.get("embedding_size", hidden) if values["model_type"] == "electra" else hidden
    rows = values["vocab_size"] + config.get("max_position_embeddings", 512) + config.get("type_vocab_size", 2)
    embeddings = (rows + 2) * size + (size * hidden + hidden if size != hidden else 0)
    head = (
        hidden * hidden + hidden + hidden * head_outputs + head_outputs
    )  # BERT's pooler, RoBERTa's and ELECTRA's dense
    return _plain_layer(hidden, values["intermediate_size"]), embeddings + head


def _count_distilbert(config: Mapping[str, Any], values: Mapping[str, Any], head_outputs: int) -> tuple[int, int]:
    return _count_bert({**config, "type_vocab_size": 0}, values, head_outputs)


def _count_gpt2(config: Mapping[str, Any], values: Mapping[str, Any], head_outputs: int) -> tuple[int, int]:
    hidden = values["hidden_size"]
    rest = (values["vocab_size"] + int(values["num_positions"] or 1024) + 2 + head_outputs) * hidden
    return _plain_layer(hidden, values["intermediate_size"]), rest


def _count_modernbert(config: Mapping[str, Any], values: Mapping[str, Any], head_outputs: int) -> tuple[int, int]:
    hidden, intermediate = values["hidden_size"], values["intermediate_size"]
    layer = 4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden
    # The first layer has no norm before its attention; there are norms after the embeddings, the layers and the head.
    rest = values["vocab_size"] * hidden + 2 * hidden + hidden * hidden + hidden + hidden * head_outputs + head_outputs
    return layer, rest - hidden


def _count_llama(config: Mapping[str, Any], values: Mapping[str, Any], head_outputs: int) -> tuple[int, int]:
    hidden, intermediate, head = values["hidden_size"], values["intermediate_size"], values["head_size"]
    queries, keys = values["num_heads"] * head, values["num_key_value_heads"] * head
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * intermediate + 2 * hidden
    if values["model_type"] == "qwen2":
        layer += queries + 2 * keys
    elif config.get("attention_bias"):
        layer += queries + 2 * keys + hidden
    if values["model_type"] == "qwen3":
        layer += 2 * head
    return layer, (values["vocab_size"] + 1 + head_outputs) * hidden


def _count_mixtral(config: Mapping[str, Any], values: Mapping[str, Any], head_outputs: int) -> tuple[int, int]:
    """A Llama with a feed-forward for each expert, and a router."""
    layer, rest = _count_llama(config, values, head_outputs)
    hidden, experts = values["hidden_size"], count_experts(config)
    return layer + (experts - 1) * 3 * hidden * values["intermediate_size"] + experts * hidden, rest


def _count_vit(config: Mapping[str, Any], values: Mapping[str, Any], head_outputs: int) -> tuple[int, int]:
    """Patches are projected by one convolution; a token and positions of their own, a last norm, no pooler."""
    hidden = values["hidden_size"]
    inputs = int(config.get("num_channels", 3)) * int(config["patch_size"]) ** 2
    rest = (inputs + 1) * hidden + (count_patches(config) + 2) * hidden + 2 * hidden + (hidden + 1) * head_outputs
    return _plain_layer(hidden, values["intermediate_size"]), rest


def _count_unknown(config: Mapping[str, Any], values: Mapping[str, Any], head_outputs: int) -> tuple[int, int]:
    """Counted like a Llama if the config looks like one, else like a BERT."""
    if "rms_norm_eps" in config or "num_key_value_heads" in config:
        return _count_llama(config, values, head_outputs)
    return _count_bert(config, values, head_outputs)


_COUNTS: dict[str, _Count] = {
    "bert": _count_bert,
    "roberta": _count_bert,
    "xlm-roberta": _count_bert,
    "camembert": _count_bert,
    "electra": _count_bert,
    "distilbert": _count_distilbert,
    "gpt2": _count_gpt2,
    "modernbert": _count_modernbert,
    "llama": _count_llama,
    "mistral": _count_llama,
    "mixtral": _count_mixtral,
    "qwen2": _count_llama,
    "qwen3": _count_llama,
    "vit": _count_vit,
}
