"""The loss of each token that a causal language model predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from onecurve.training.tasks.base import NO_TARGET

if TYPE_CHECKING:
    import torch


class TokenLosses(NamedTuple):
    """What was found at each place of a batch but the last; place i predicts token i + 1.

    Attributes:
        losses: [rows, length - 1] cross-entropy in float32 or wider; 0 where there is no target.
        is_right: [rows, length - 1] bool: whether the most likely token is the target; False where there is none.
    """

    losses: torch.Tensor
    is_right: torch.Tensor


def token_losses(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    chunk_tokens: int | None = None,
) -> TokenLosses:
    """Run a causal language model over a batch and compare what it predicts with the tokens that follow.

    Args:
        model: its forward takes `inputs` and returns logits [rows, length, vocabulary].
        inputs: the features that the model reads, [rows, length] each.
        labels: [rows, length] int64: at each place the token that stands there, NO_TARGET where it is not learned. They are
            not shifted: this function compares the logits of place i with the label of place i + 1.
        chunk_tokens: places whose logits may be in memory at once; None takes all of them.
    """
    import torch.nn.functional as F

    logits = model(**inputs, use_cache=False).logits[:, :-1]
    logits = logits.float() if logits.element_size() < 4 else logits
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=NO_TARGET, reduction="none")
    return TokenLosses(losses, logits.argmax(-1) == targets)
