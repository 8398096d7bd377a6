"""The numbers of a transformer that memory and compute depend on, read from its config.json alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecurve.launcher.errors import UncountableModel, UnreadableModel
from onecurve.training.architectures import FIRST_TOKEN_CLASSIFIERS, count_positions

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
_TIED_TYPES = ("gpt2", "opt", "gemma", "gemma2", "gemma3_text")
# Outputs of the head: a config.json does not say how many, and their parameters are few beside all others.
_HEAD_OUTPUTS = 2
# Largest header of a safetensors file (the format's own limit).
_MAX_HEADER_BYTES = 100_000_000


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
        shape, num_experts = build_shape(config, predicts_tokens=predicts_tokens), count_experts(config)
    except (OSError, ValueError) as error:
        raise UnreadableModel(f"{path} can't be read: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableModel(f"{path}: not the config of a transformer: it has no {error}") from None
    if not shape.is_exact:
        counted = count_stored_parameters(path.parent)
        if counted:
            layer = max(0, counted - shape.embedding_parameters) // shape.num_layers
            counts = {"num_parameters": counted, "layer_parameters": layer, "is_exact": True}
            return ModelShape(**{**shape.__dict__, **counts})
        if num_experts > 1:
            raise UncountableModel(
                f"{path}: {shape.model_type} mixes {num_experts} experts in a way that Onecurve does not know, so its "
                "parameters can only be counted from its weights; download them"
            )
    return shape


def find_config(model: str) -> Path | None:
    """The model's config.json: in its folder, the file itself, or the newest snapshot in the hub's cache."""
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        return path / "config.json" if (path / "config.json").is_file() else None
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE).glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


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
        "vocab_size": number("vocab_size"),
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


def count_stored_parameters(folder: Path) -> int:
    """Parameters in a folder's safetensors files, from their headers; 0 if there are none, or one can't be read."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, _MAX_HEADER_BYTES)))
            for name, entry in header.items():
                if name != "__metadata__":
                    product = 1
                    for length in entry["shape"]:
                        product *= length
                    total += product
        except (OSError, ValueError, KeyError, struct.error):
            return 0
    return total


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
}
