"""The loss of each token that a language model predicts: the next token, or a masked one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from onecurve.training.tasks.base import NO_TARGET, to_float32

if TYPE_CHECKING:
    import torch


class TokenLosses(NamedTuple):
    """What was found at each place of a batch that may have a target; place i predicts token i + ahead.

    Attributes:
        losses: [rows, length - ahead] cross-entropy in float32 or wider; 0 where there is no target.
        is_right: [rows, length - ahead] bool: whether the most likely token is the target; False where there is none.
    """

    losses: torch.Tensor
    is_right: torch.Tensor


def token_losses(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    chunk_tokens: int | Literal["auto"] | None = None,
    target_places: torch.Tensor | None = None,
    ahead: int = 1,
) -> TokenLosses:
    """Run a language model over a batch and compare what it predicts with the tokens that should be there.

    In chunks, only places with a target go through the output layer. Gradients are those of all logits at once.

    Args:
        model: its forward takes `inputs` and returns logits [rows, length, vocabulary].
        inputs: the features that the model reads, [rows, length] each.
        labels: [rows, length] int64: at each place the token that stands there, NO_TARGET where it is not learned. They are
            not shifted: this function compares the logits of place i with the label of place i + ahead.
        chunk_tokens: places whose logits may be in memory at once; "auto" chooses by the vocabulary, None takes all of them.
            A model whose losses can't be computed in chunks takes all of them as well, and says so once.
        target_places: [targets] int64, places with a target; None looks for them, for which a GPU is waited for.
        ahead: 1 for a model that predicts the next token, 0 for one that predicts the token of the place itself.
    """
    import torch.nn.functional as F

    from onecurve.training.architectures import choose_chunk_tokens
    from onecurve.training.tasks.chunked_head import find_tried_head, run_with_losses
    from onecurve.training.tasks.chunked_losses import Places

    head = None if chunk_tokens is None else find_tried_head(model)
    if head is not None and chunk_tokens is not None:
        size = choose_chunk_tokens(chunk_tokens, head.vocab_size)
        places = Places.find(labels, target_places, ahead)
        losses, _, is_right = run_with_losses(model, head, inputs, places, size)
        return TokenLosses(losses, is_right)
    logits = to_float32(model(**inputs, use_cache=False).logits[:, : labels.shape[1] - ahead])
    targets = labels[:, ahead:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=NO_TARGET, reduction="none")
    return TokenLosses(losses, logits.argmax(-1) == targets)
