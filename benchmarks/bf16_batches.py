"""Whether logits and gradients in bf16 depend on what an example is computed with, and what it costs if they must not.

The demo's MiniLM and `NUM_EXAMPLES` of its news, of 8 to 60 words. Each way of computing them is tried twice: the second time
the examples have another order, so other neighbours and another place in their batch, and gradients are added in that order.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy import write_data
from tools.trainings import DEMO

NUM_EXAMPLES = 16
ROUNDS = 2
# Tokens: longer than the longest of the texts.
FIXED_LENGTH = 128


@dataclass(frozen=True)
class Computed:
    """What a way of computing examples gave.

    Attributes:
        num_equal: examples of which both orders have logits of the same bits.
        num_examples: of how many.
        gradient: the norm of the difference between both orders' gradients of all examples, over the norm of one.
        cpu_seconds: of forward and backward of all, the least of a few rounds.
    """

    name: str
    num_equal: int
    num_examples: int
    gradient: float
    cpu_seconds: float


# Examples of a forward, and the length to which they are padded; None is the longest of them.
WAYS: dict[str, tuple[int, int | None]] = {
    "8 at once, padded to the longest": (8, None),
    f"8 at once, padded to {FIXED_LENGTH} tokens": (8, FIXED_LENGTH),
    "each alone": (1, None),
    f"each alone, padded to {FIXED_LENGTH} tokens": (1, FIXED_LENGTH),
}


def compare_batches(
    num_examples: int = NUM_EXAMPLES, rounds: int = ROUNDS, names: Sequence[str] = tuple(WAYS)
) -> list[Computed]:
    """Compute the examples in these of the WAYS; rounds take turns."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from onecurve.training.models import matrix_attention

    lines = (write_data() / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:num_examples]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    examples = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(DEMO / "model", num_labels=5).eval()
    matrix_attention.install(model)
    orders = [list(range(num_examples)) for _ in range(2)]
    random.Random(0).shuffle(orders[1])
    results: dict[str, list[tuple[Any, Any]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            size, length = WAYS[name]
            started = time.process_time()
            found = [compute(model, examples, order, size, length) for order in orders]
            seconds[name].append((time.process_time() - started) / 2)
            if number == 0:
                results[name] = found
    return [
        Computed(
            name,
            num_equal=int((logits == other_logits).all(dim=1).sum()),
            num_examples=num_examples,
            gradient=float((gradient - other_gradient).norm() / gradient.norm()),
            cpu_seconds=min(seconds[name]),
        )
        for name, ((logits, gradient), (other_logits, other_gradient)) in results.items()
    ]


def compute(
    model: Any, examples: Sequence[Sequence[int]], order: Sequence[int], size: int, length: int | None
) -> tuple[Any, Any]:
    """Forward and backward in bf16, with classes 0, 1, 2, ... as labels.

    Args:
        order: in which the examples are computed, `size` at a time.
        length: tokens to which rows are padded; None: the longest of the batch.

    Returns:
        Logits [examples, classes], in the order of `examples`, and the gradient [weights] of the sum of all losses; float32.
    """
    import torch

    model.zero_grad()
    logits: list[Any] = [None] * len(examples)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        longest = length or max(len(examples[place]) for place in chosen)
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, place in enumerate(chosen):
            tokens[row, : len(examples[place])] = torch.tensor(examples[place])
            mask[row, : len(examples[place])] = 1
        with torch.autocast("cpu", torch.bfloat16):
            found = model(input_ids=tokens, attention_mask=mask).logits.float()
        labels = torch.tensor(chosen) % found.shape[1]
        loss: Any = torch.nn.functional.cross_entropy(found, labels, reduction="sum")
        loss.backward()
        for place, row in zip(chosen, found.detach(), strict=True):
            logits[place] = row
    gradients = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
    return torch.stack(logits), torch.cat(gradients)
