"""Facts about families of models that both training and the launcher's arithmetic need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

# Classifiers that read the first token alone, by config.model_type; their classes are named <prefix>ForSequenceClassification.
# The last layer of these computes that token only (models/last_layer.py).
FIRST_TOKEN_CLASSIFIERS = {
    "bert": "Bert",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}

# Models whose positions begin behind the padding token's number: so many fewer can be used.
_POSITIONS_BEHIND_PADDING = frozenset(
    {
        "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
        "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip

# Models that see only how far apart two tokens are: a text may have any length.
_RELATIVE_POSITIONS = frozenset({"longt5", "mt5", "switch_transformers", "t5", "transfo-xl", "umt5", "xlnet"})

# Bytes of float32 logits that `loss_chunk_tokens: auto` aims at: enough for fast products, little beside a model.
_CHUNK_BYTES = 128 * 2**20
_FEWEST_CHUNK_TOKENS = 64

QUERIES_PER_BLOCK = 256
"""Of causal attention in bf16 on a CPU (models/causal_matrices.py): smaller blocks compute less of what no query sees, and are
slower products."""


def list_heads(config: Any) -> list[str]:
    """Names that say which head a model's weights have: of its class and, where it brings its own code, of the auto class
    that stands for it."""
    classes = list(config.architectures or [])
    auto_map: Mapping[str, Any] = getattr(config, "auto_map", None) or {}
    return classes + [name for name, own in auto_map.items() if str(own).rpartition(".")[2] in classes]


def choose_chunk_tokens(wanted: int | Literal["auto"], vocab_size: int) -> int:
    """How many tokens' logits a language model's loss holds in memory at once, for a recipe's loss_chunk_tokens."""
    return max(_FEWEST_CHUNK_TOKENS, _CHUNK_BYTES // (4 * vocab_size)) if wanted == "auto" else wanted


def list_query_blocks(length: int, window: int | None = None) -> list[tuple[int, int, int]]:
    """Of each block of queries: its begin, its end, and the first key that one of it sees.

    Args:
        window: most tokens that one sees, itself included; None for all before it.
    """
    return [
        (begin, min(begin + QUERIES_PER_BLOCK, length), 0 if window is None else max(0, begin - window + 1))
        for begin in range(0, length, QUERIES_PER_BLOCK)
    ]


def count_block_scores(length: int) -> int:
    """How many scores of a head are computed for a sequence where each block of queries takes the keys up to its end."""
    return sum((end - begin) * (end - first) for begin, end, first in list_query_blocks(length))


def count_positions(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model takes, from its config.json; None where there is no limit, or none is known."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    has_none = config.get("model_type") in _RELATIVE_POSITIONS or config.get("position_biased_input") is False
    if not isinstance(positions, int) or positions <= 0 or has_none:
        return None
    if config.get("model_type") in _POSITIONS_BEHIND_PADDING:
        padding = config.get("pad_token_id")
        return positions - (1 if padding is None else int(padding)) - 1
    return positions


def count_patches(config: Mapping[str, Any]) -> int:
    """The patches that a model makes of an image of its own size, from its config.json; 1 where it says nothing of them."""
    image, patch = config.get("image_size"), config.get("patch_size")
    return (image // patch) ** 2 if isinstance(image, int) and isinstance(patch, int) and 0 < patch <= image else 1


# Encoders whose config.json may name no head, because the model was saved without one.
_ENCODERS = frozenset({*FIRST_TOKEN_CLASSIFIERS, "albert", "deberta", "deberta-v2", "modernbert", "mpnet"})


def find_kind(config: Mapping[str, Any]) -> Literal["encoder", "decoder", "encoder-decoder"] | None:
    """What kind of transformer a config.json describes; None where it does not say."""
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    heads: list[str] = config.get("architectures") or [""]
    head = heads[0]
    if head.endswith(("ForCausalLM", "LMHeadModel")):
        return "decoder"
    return "encoder" if head.endswith("ForMaskedLM") or config.get("model_type") in _ENCODERS else None
