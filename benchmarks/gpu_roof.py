"""How fast a GPU could at most train the decoder of benchmarks.gpu: what each operation computes and moves, without a GPU.

    python -m benchmarks.gpu_roof           # half a minute; prints a table

One micro-batch goes forward and backward with tensors that have shapes and no numbers. Each operation takes as long as its
product at the fastest rate measured, or as its inputs and outputs through memory, or as the smallest kernel: a roof (Williams et
al. 2009, "Roofline: an insightful visual performance model"). A real step is below it: the host has to keep up, and the
optimizer, which comes once for several micro-batches, is left out. Kernels that this build of torch may lack, flash attention and
RMSNorm, are counted as what they read and write.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.parts import DECODER, TINY_DECODER
from benchmarks.operation_clock import MATRIX_PRODUCTS
from onecurve.training.models import rms_norms
from onecurve.training.tasks import chunked_head
from onecurve.training.tasks.token_losses import token_losses

# An H100: the data sheet's dense bf16, the fastest product in gpu.json, four fifths of the memory's 3.35 TB/s, and what
# the smallest kernel takes.
DATA_SHEET, PRODUCTS, MEMORY, SMALLEST = 989e12, 780e12, 2.7e12, 2e-6

ATTENTION = "gpu_roof"

NUM_TEXTS, NUM_TOKENS = 8, 7_300
"""Of a micro-batch of benchmarks.gpu."""

# They only look at a tensor in another way, or make one whose numbers somebody else writes.
_NO_KERNELS = frozenset(
    {
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "device", "empty", "empty_like", "empty_strided",
        "expand", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice",
        "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    }
)  # fmt: skip
# What they read is as large as what they write, however large their first input is; or is nothing.
_READ_WHAT_THEY_WRITE = frozenset({"embedding", "gather", "index_select"})
_ONLY_WRITE = frozenset(
    {"fill_", "new_full", "new_zeros", "ones", "ones_like", "scalar_tensor", "zero_", "zeros", "zeros_like"}
)


@dataclass
class Count:
    """Kernels, and the seconds that each kind of them takes at least.

    Attributes:
        flops: of matrix products.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: int = 0

    def clear(self) -> None:
        """Count from nothing."""
        self.kernels.clear()
        self.seconds.clear()
        self.flops = 0

    def add(self, kind: str, num_bytes: int, flops: int = 0) -> None:
        """Count a kernel."""
        self.kernels[kind] += 1
        self.seconds[kind] += max(SMALLEST, num_bytes / MEMORY, flops / PRODUCTS)
        self.flops += flops


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation."""

    def __init__(self, count: Count) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = count

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        name = operation.overloadpacket.__name__
        if name in _NO_KERNELS:
            return result
        read = [] if name in _ONLY_WRITE else tree_leaves((arguments, options))
        written = tree_leaves(result)
        if name in _READ_WHAT_THEY_WRITE:
            read = written
        flops = 2 * result.numel() * arguments[-1].shape[-2] if name in MATRIX_PRODUCTS else 0
        self._count.add("products" if flops else name, _size((*read, *written)), flops)
        return result


def _size(values: Sequence[Any]) -> int:
    return sum(each.numel() * each.element_size() for each in values if isinstance(each, torch.Tensor))


class _Attention(torch.autograd.Function):
    """Flash attention: reads queries, keys and values and writes the context; backward reads these and more, writes gradients."""

    @staticmethod
    def forward(ctx: Any, count: Count, *states: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*states)
        ctx.count = count
        count.add("attention", _size(states) + _size(states[:1]))
        return torch.empty_like(states[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        states = ctx.saved_tensors
        ctx.count.add("attention", 2 * _size(states) + 2 * _size([gradient]))
        return (None, *(torch.empty_like(each) for each in states))


class _Norm(torch.autograd.Function):
    """torch.nn.functional.rms_norm: a kernel forward; backward one for inputs, and two for weights, which are summed in parts."""

    @staticmethod
    def forward(ctx: Any, count: Count, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.count = count
        count.add("norms", 2 * _size([hidden]))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        ctx.count.add("norms", 3 * _size([hidden]))
        ctx.count.add("norms", 2 * _size([hidden]))
        ctx.count.add("norms", _size([weight]))
        return None, torch.empty_like(hidden), torch.empty_like(weight)


def _build_attention(count: Count) -> Any:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: None, **others: Any) -> tuple[torch.Tensor, None]:
        states = (each[0].transpose(0, 1).to(torch.bfloat16) for each in (query, key, value))
        return _Attention.apply(count, *states)[None], None  # type: ignore[no-untyped-call]

    return attend


def _build_norm(count: Count) -> Any:
    def normalize(hidden: torch.Tensor, shape: Any, weight: torch.Tensor, epsilon: float) -> Any:
        return _Norm.apply(count, hidden, weight)  # type: ignore[no-untyped-call]

    return normalize


def measure(shape: dict[str, Any], num_texts: int, num_tokens: int, exchanges_norms: bool) -> Count:
    """Count a packed micro-batch of a Llama in bf16 whose gradients are added to those of the one before."""
    count = Count()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).train()
    if exchanges_norms:
        rms_norms.install(model)
    # A name of its own, for which transformers builds no mask.
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _build_attention(count))
    with FakeTensorMode(allow_non_fake_inputs=True), patch("torch.nn.functional.rms_norm", _build_norm(count)):
        model.to_empty(device="cpu")
        model.tie_weights()
        model.set_attn_implementation(ATTENTION)
        chunked_head._HEADS[model] = chunked_head.find_head(model)  # Without numbers it can't be tried.
        tokens = torch.empty(1, num_tokens, dtype=torch.int64)
        places = torch.empty(num_tokens - num_texts, dtype=torch.int64)
        for _ in range(2):  # The first has no gradients to add to.
            count.clear()
            with _Watcher(count):
                with torch.autocast("cpu", torch.bfloat16):
                    losses = token_losses(
                        model, {"input_ids": tokens, "position_ids": tokens}, tokens, "auto", places
                    ).losses
                losses.sum().backward()  # type: ignore[no-untyped-call]
    return count


def to_table(own: Count, exchanged: Count, num_tokens: int, num_shown: int = 12) -> list[str]:
    """The kinds of kernels that take most, and what comes of all."""
    lines = ["| of a micro-batch | transformers' norms | torch's norm |", "|---|---|---|"]
    shown = [kind for kind, _ in sorted(own.seconds.items(), key=lambda item: -item[1])[:num_shown]]
    if "norms" not in shown:
        shown.append("norms")
    for kind in shown:
        cells = [f"{1e3 * each.seconds[kind]:.1f} ms, {each.kernels[kind]:,} kernels" for each in (own, exchanged)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    rest = [(sum(each.seconds.values()) - sum(each.seconds[kind] for kind in shown)) * 1e3 for each in (own, exchanged)]
    totals = [(sum(each.seconds.values()), each.kernels.total(), each.flops) for each in (own, exchanged)]
    lines.append(f"| all else | {' | '.join(f'{each:.1f} ms' for each in rest)} |")
    lines.append(
        f"| all | {' | '.join(f'{1e3 * seconds:.1f} ms, {number:,} kernels' for seconds, number, _ in totals)} |"
    )
    lines.append(f"| tokens a second | {' | '.join(f'{num_tokens / seconds:,.0f}' for seconds, *_ in totals)} |")
    shares = [f"{flops / seconds / DATA_SHEET:.1%}" for seconds, _, flops in totals]
    lines.append(f"| of the data sheet's rate | {' | '.join(shares)} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model that says nothing of a GPU, for tests")
    is_tiny = parser.parse_args(arguments).tiny
    shape, num_tokens = (TINY_DECODER, 64) if is_tiny else (DECODER, NUM_TOKENS)
    own, exchanged = (measure(shape, NUM_TEXTS, num_tokens, exchanges) for exchanges in (False, True))
    print("\n".join(to_table(own, exchanged, num_tokens)))


if __name__ == "__main__":
    main(sys.argv[1:])
