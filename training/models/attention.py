"""Attention that knows where sequences lie from the plan, and never looks at a mask or at positions to find out.

transformers reads masks and positions to see whether there is padding, or several sequences in a row; a GPU is waited for
each time. Here lengths come with the batch as numbers of the host. A causal model whose rows are padded on the right needs no
mask at all, and one whose sequences lie one behind the other gets their offsets. Other models get masks that are built
without a look at what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onecurve.training.models import matrix_attention
from onecurve.training.models.causal_matrices import attend_causally
from onecurve.training.models.example_masks import Site, open_site
from onecurve.training.models.sequence_rows import group_by_length, to_rows, to_sequences

ATTENTION = "onecurve_causal"
"""The name under which transformers finds the attention below. Without a mask function of that name, it builds no mask."""

# torch 2.11's kernel wants as many heads of keys as of queries.
_GROUPS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_ROPE_TYPES_OF_ANY_LENGTH = frozenset({"dynamic", "longrope"})


class HiddenLengths:
    """Lengths of packed sequences on their way through compiled layers, which would be compiled anew for each number they see.

    Attributes:
        lengths: [sequences]
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths


def hide_lengths(body: torch.nn.Module) -> None:
    """Let the layers of a model's body get `HiddenLengths`."""

    def hide(body: torch.nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        lengths = named.get("sequence_lengths")
        return inputs, named if lengths is None else {**named, "sequence_lengths": HiddenLengths(lengths)}

    body.register_forward_pre_hook(hide, with_kwargs=True)


def prevent_reads(model: Any) -> None:
    """Let nothing in a model's forward read a tensor to find out whether there is padding.

    Masks of SDPA and of eager attention are built without a look at them, for every model of this process.
    """
    for name, build in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(_build_mask, build))
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _warn_of_nothing


def _warn_of_nothing(*inputs: Any) -> None:
    """The collator leaves a mask out only where the model needs none."""


def _build_mask(
    build: Any,
    *,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> torch.Tensor | None:
    """A mask that is given hides something, or the collator would have left it out: to build none is not tried."""
    is_full = attention_mask is None
    mask: torch.Tensor | None = build(
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and is_full,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and is_full,
        **others,
    )
    return mask


def find_obstacle(model: Any) -> str | None:
    """Why a model can't take the attention below; None where it can, as far as its config and class say.

    Flash attention has no mask either, so a family that supports it passes on all that a mask would hold, such as a sliding
    window.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = {str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    if not (getattr(model, "_supports_flash_attn", False) and getattr(model, "_supports_attention_backend", False)):
        return "its attention can't be exchanged"
    if not is_causal(model):
        return "it is not causal"
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        return "it is more than a decoder"
    if unknown := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of {', '.join(sorted(unknown))}"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "it attends in chunks"
    if ropes & _ROPE_TYPES_OF_ANY_LENGTH:
        return "its positions depend on the longest sequence of a batch"
    return None


def is_causal(model: Any) -> bool:
    """Whether no token of any layer sees those that follow it."""
    flags = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return bool(flags) and all(flags) and getattr(model.config, "is_causal", True)


def install(model: Any) -> None:
    """Exchange the attention of a causal model, after `example_dropout` has had its turn."""
    prefers_matrices = model.config._attn_implementation == matrix_attention.ATTENTION
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, partial(attend, prefers_matrices=prefers_matrices))
    model.set_attn_implementation(ATTENTION)


@contextmanager
def of_transformers(model: Any) -> Iterator[None]:
    """Let a model have one of transformers' own attentions for a while: a generation needs masks and a cache.

    Nothing is compiled meanwhile: the states of a cache are so many programs that torch's limit of them would be reached, and
    the training, which comes after the first samples, have none.
    """
    name = model.config._attn_implementation
    is_ours = name in (ATTENTION, matrix_attention.ATTENTION)
    if is_ours:
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if is_ours:
            model.set_attn_implementation(name)


# How many groups of rows there are differs from batch to batch, so a compiled layer leaves its graph here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sequence_lengths: tuple[int, ...] | HiddenLengths | None = None,
    sequence_offsets: torch.Tensor | None = None,
    prefers_matrices: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention for transformers, of rows that are padded on the right or of packed sequences.

    Args:
        query, key, value: [examples, heads, length, head size], or [1, heads, tokens, head size] of packed sequences; keys
            and values may have fewer heads.
        sliding_window: most tokens that one sees, itself included.
        softcap: scores are softcap x tanh(scores / softcap).
        s_aux: [heads] scores of a sink: what goes there is lost.
        sequence_lengths: [sequences] of packed sequences; None where each row is one.
        sequence_offsets: [sequences + 1] int32, where each begins and the last ends.
        prefers_matrices: in bf16 they are quicker than SDPA, as on a CPU.

    Returns:
        [examples, length, heads, head size], and no attention weights.
    """
    assert attention_mask is None, "a mask would be ignored"
    assert query.shape[2] == key.shape[2], "a cache needs one of transformers' own attentions"
    attend_rows = partial(
        _attend_rows, module, dropout=dropout, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux,
        prefers_matrices=prefers_matrices, site=open_site() if dropout else None,
    )  # fmt: skip
    if sequence_lengths is None:
        return attend_rows(query, key, value, first_row=0), None
    if isinstance(sequence_lengths, HiddenLengths):
        sequence_lengths = sequence_lengths.lengths
    assert sequence_offsets is not None
    dtype = _find_computing_type(query)
    if has_kernel(query.device, dtype, query.shape[-1]) and not dropout and softcap is None and s_aux is None:
        key, value = (_repeat_heads(each, query.shape[1]) for each in (key, value))
        queries, keys, values = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
        longest = max(sequence_lengths)
        context = varlen_attn(
            queries, keys, values, sequence_offsets, sequence_offsets, longest, longest, scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0), **_GROUPS,
        )  # fmt: skip
        assert isinstance(context, torch.Tensor)
        return context[None], None
    groups = group_by_length(sequence_lengths)
    # Split at once: each slice by itself would have a gradient as large as the whole.
    split = partial(torch.split, split_size_or_sections=[sum(lengths) for lengths in groups])
    pieces, first_row = [], 0
    states = (split(each[0].transpose(0, 1)) for each in (query, key, value))
    for lengths, *sequences in zip(groups, *states, strict=True):
        rows = (to_rows(each, lengths).transpose(1, 2) for each in sequences)
        pieces.append(to_sequences(attend_rows(*rows, first_row=first_row), lengths))
        first_row += len(lengths)
    return torch.cat(pieces)[None], None


def _find_computing_type(states: torch.Tensor) -> torch.dtype:
    """What autocast computes products in. Rotary positions leave queries and keys in float32 there, and values not."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _repeat_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values [1, their heads, tokens, head size] for the kernel: a copy for each head of queries, if it asks for that."""
    return states if _GROUPS else repeat_kv(states, heads // states.shape[1])


def has_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's flash attention takes sequences of different lengths at once here."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_size > 256 or head_size % 8:
        return False
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def find_slow_packing(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why packed sequences would be slow: no kernel takes them all, and each group of them has its own; None if they are not.

    On a CPU a kernel costs next to nothing. A GPU's host has to issue hundreds in place of ten for each layer.

    Args:
        dtype: what products are computed in.
    """
    if device.type == "cpu":
        return None
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not has_kernel(device, dtype, size):
        return f"this device has no kernel for sequences of different lengths in {str(dtype).removeprefix('torch.')}"
    drops = any(getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop"))
    has_sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    if drops or has_sinks or getattr(config, "attn_logit_softcapping", None) is not None:
        return "no kernel takes sequences of different lengths with this model's attention"
    return None


def _attend_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    prefers_matrices: bool,
    site: Site | None,
    first_row: int,
) -> torch.Tensor:
    """Each row a sequence: [examples, heads, length, head size] -> [examples, length, heads, head size].

    Args:
        site: of the dropout, where masks are by example.
        first_row: the example of the first row, by its number in the batch.
    """
    length = query.shape[2]
    window = None if window is None or window >= length else window
    if softcap is not None or sinks is not None:
        drop = partial(_drop, dropout=dropout, is_training=module.training, site=site, first_row=first_row)
        return _attend_plainly(query, key, value, drop, scaling, window, softcap, sinks)
    dtype = _find_computing_type(query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if site is not None or (prefers_matrices and not dropout and dtype == torch.bfloat16 and torch.is_grad_enabled()):
        groups = query.shape[1] // key.shape[1]
        states = (query.to(dtype), repeat_kv(key.to(dtype), groups), repeat_kv(value.to(dtype), groups))
        mask = _build_mask_of_rows(length, window, query.device, dtype)
        if site is None:
            found = attend_causally(*states, mask, scale, window)
        else:
            found = matrix_attention.attend_by_example(*states, mask[None, None], scale, dropout, site, first_row)
        return found.transpose(1, 2).contiguous()
    seen = None if window is None else _build_mask_of_rows(length, window, query.device)
    context: torch.Tensor
    context, _ = sdpa_attention_forward(
        module, query, key, value, seen, dropout=dropout, scaling=scaling, is_causal=seen is None
    )
    assert isinstance(context, torch.Tensor)
    return context


def _build_mask_of_rows(
    length: int, window: int | None, device: torch.device, dtype: torch.dtype = torch.bool
) -> torch.Tensor:
    """[length, length] what each token sees: true, or 0 and else the lowest number; the corner of a larger one."""
    size = 1 << (length - 1).bit_length()
    return _build_large_mask(size, window, device, dtype)[:length, :length]


@lru_cache(maxsize=8)  # All layers and nearly all lengths of a training share a few masks.
def _build_large_mask(size: int, window: int | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    seen = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    seen = seen if window is None else seen.triu(1 - window)
    if dtype == torch.bool:
        return seen
    return torch.zeros(size, size, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)


def _drop(weights: torch.Tensor, dropout: float, is_training: bool, site: Site | None, first_row: int) -> torch.Tensor:
    if site is None:
        return torch.nn.functional.dropout(weights, dropout, is_training)
    return matrix_attention.drop(weights, dropout, site, first_row)


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    drop: Callable[[torch.Tensor], torch.Tensor],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The textbook's formula, with capped scores (Gemma 2) and a sink for each head (gpt-oss), which SDPA lacks."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores.float() if scores.element_size() < 4 else scores
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + _build_mask_of_rows(query.shape[2], window, query.device, scores.dtype)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(value.dtype)
    return (drop(weights) @ value).transpose(1, 2).contiguous()
