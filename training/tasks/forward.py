"""What a forward finds of each example: its loss, and what metrics and predictions need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What stands in padded places of targets: cross_entropy's ignore_index.
NO_TARGET = -100


@dataclass(frozen=True)
class Forward:
    """What one forward found.

    Attributes:
        losses: [examples] summed over each example's targets, in float32 or wider; None where the batch has no targets.
        results: [examples, ...] tensors that metrics and predictions need, by name. Those of more than one dimension are
            padded on the right; `Task.ragged_results` names them.
    """

    losses: torch.Tensor | None
    results: Mapping[str, torch.Tensor] = field(default_factory=dict)


def pick_example(results: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The results of one example alone, as those of all of them are given."""
    return {name: values[number : number + 1] for name, values in results.items()}


def to_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, or in the wider type that they have: losses and probabilities are not computed in bf16."""
    return logits.float() if logits.element_size() < 4 else logits


def sum_by_example(values: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[examples] sum of what belongs to the tokens of each example, zeros at padding included.

    Args:
        values: [examples, length], or [1, tokens] where the batch is packed; also without the last place, or last places.
    """
    import torch

    if "sequence_offsets" not in batch:
        return values.sum(dim=-1)
    offsets = batch["sequence_offsets"].clamp(max=values.shape[1])
    # Unsafe: offsets that come from the plan need no check, for which a GPU would have to be waited for.
    return torch.segment_reduce(values[0], "sum", offsets=offsets, unsafe=True, initial=0)
