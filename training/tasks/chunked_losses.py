"""Cross-entropy of a language model's head, a chunk of tokens at a time: logits of all tokens are never in memory at once.

Logits are the largest tensor of a decoder's training: 8,192 tokens times 150,000 words in float32 take 4.6 GiB, and their
softmax and gradient as much again. Here the gradient of a chunk's losses is computed beside them, so that the backward pass
only scales it, and no product is computed twice (Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training",
section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from onecurve.training.tasks.base import NO_TARGET

Compute = Callable[[torch.Tensor], torch.Tensor]


def find_target_places(labels: torch.Tensor, ahead: int = 1) -> torch.Tensor:
    """[targets] int64 places with a target among [rows, length] labels, row by row; `ahead` as in `Places`."""
    return (labels[:, ahead:] != NO_TARGET).flatten().nonzero().squeeze(-1)


@dataclass(frozen=True)
class Output:
    """What makes logits of hidden states.

    Attributes:
        layer: the output layer's own forward.
        finish: what the model does behind it.
        linear: the layer's module, if that is a plain linear layer: gradients of its weights are then added up in place.
    """

    layer: Compute
    finish: Compute
    linear: torch.nn.Linear | None = None

    def finds_gradients_of(self, tokens: torch.Tensor) -> torch.nn.Linear | None:
        """`linear`, where it computes in the precision that its gradients are added up in."""
        if self.linear is None or torch.is_autocast_enabled(tokens.device.type):
            return None
        is_wide = self.linear.weight.dtype == tokens.dtype == torch.promote_types(tokens.dtype, torch.float32)
        return self.linear if is_wide else None


@dataclass(frozen=True)
class Places:
    """Where a batch has targets. With `ahead` 1 a place is a token but the last of a row, and predicts the token behind it.

    Attributes:
        shape: (rows, length - ahead).
        numbers: [targets] int64, places with a target, row by row.
        targets: [targets] int64, what each should predict.
        ahead: how many tokens further each target stands: 1 for the next token, 0 for the place's own.
    """

    shape: tuple[int, int]
    numbers: torch.Tensor
    targets: torch.Tensor
    ahead: int = 1

    @classmethod
    def find(cls, labels: torch.Tensor, numbers: torch.Tensor | None = None, ahead: int = 1) -> Places:
        """All targets among labels.

        Args:
            labels: [rows, length].
            numbers: [targets] their places. Without them a GPU is waited for, as their number decides the shapes that follow.
        """
        targets = labels[:, ahead:]
        if numbers is None:
            numbers = find_target_places(labels, ahead)
        return cls((targets.shape[0], targets.shape[1]), numbers, targets.flatten()[numbers], ahead)

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """[targets, hidden size] of [rows, length, hidden size]."""
        rows = self.numbers // max(1, self.shape[1])
        return hidden.flatten(0, 1).index_select(0, self.numbers + self.ahead * rows)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, length - ahead] values of the targets at their places, 0 elsewhere."""
        return values.new_zeros(self.shape).flatten().index_copy(0, self.numbers, values).view(self.shape)


def compute_losses(
    output: Output, parameters: Sequence[torch.Tensor], hidden: torch.Tensor, places: Places, chunk_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of all targets, with gradients for hidden states and parameters if they are asked for.

    Args:
        output: gives logits [tokens, vocabulary] of hidden states [tokens, hidden size].
        parameters: those that it trains.
        hidden: [rows, length, hidden size].
        chunk_tokens: places whose logits are in memory at once.

    Returns:
        [rows, length - ahead] losses in float32 or wider, 0 where there is no target; and as many bools, whether the most
        likely token is the target, False where there is none.
    """
    tokens = places.select(hidden)
    if torch.is_grad_enabled():
        losses, is_right = _Losses.apply(output, places, chunk_tokens, tokens, *parameters)  # type: ignore[no-untyped-call]
        return losses, is_right
    found = _run(output, tokens, places.targets, chunk_tokens)
    return places.spread(found.losses), places.spread(found.is_right)


@dataclass
class _Found:
    """What chunks gave: [targets] losses and whether they are right; and gradients of the sum of all losses."""

    losses: torch.Tensor
    is_right: torch.Tensor
    of_tokens: torch.Tensor | None
    of_parameters: list[torch.Tensor]


def _run(
    output: Output,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    chunk_tokens: int,
    parameters: Sequence[torch.Tensor] = (),
    wants_gradients: bool = False,
    weights: torch.Tensor | None = None,
) -> _Found:
    """Go through all chunks.

    Args:
        weights: [targets] factors of the losses in the sum whose gradients are computed; None are ones.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    found = _Found(
        torch.empty(len(targets), dtype=wide, device=tokens.device),
        torch.empty(len(targets), dtype=torch.bool, device=tokens.device),
        torch.zeros_like(tokens) if wants_gradients else None,
        [torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in parameters],
    )
    for start in range(0, len(targets), chunk_tokens):
        # In a function of its own: nothing of a chunk is left when the next one begins.
        _add_chunk(found, output, tokens, targets, slice(start, start + chunk_tokens), parameters, weights)
    return found


def _add_chunk(
    found: _Found,
    output: Output,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    part: slice,
    parameters: Sequence[torch.Tensor],
    weights: torch.Tensor | None,
) -> None:
    wants_gradients = found.of_tokens is not None
    linear = output.finds_gradients_of(tokens)
    with torch.set_grad_enabled(wants_gradients and linear is None):
        inputs = tokens[part].detach().requires_grad_(wants_gradients and linear is None)
        of_layer = output.layer(inputs)
    with torch.set_grad_enabled(wants_gradients):
        logits = output.finish(of_layer.requires_grad_(wants_gradients)).to(found.losses.dtype)
    with torch.no_grad():
        found.is_right[part] = logits.argmax(-1) == targets[part]
        slopes = F.log_softmax(logits, dim=-1)
        found.losses[part] = -slopes.gather(-1, targets[part, None]).squeeze(-1)
        if found.of_tokens is None:
            return
        # The gradient of a loss by its logits: their softmax, less one at the target.
        slopes.exp_().scatter_add_(-1, targets[part, None], slopes.new_full((len(inputs), 1), -1.0))
        if weights is not None:
            slopes.mul_(weights[part, None])
    if linear is None:
        own, *others = torch.autograd.grad(logits, [inputs, *parameters], slopes)
        for total, gradient in zip(found.of_parameters, others, strict=True):
            total.add_(gradient)
    else:
        (slopes,) = torch.autograd.grad(logits, [of_layer], slopes)
        own = slopes @ linear.weight
        for total, each in zip(found.of_parameters, parameters, strict=True):
            if each is linear.weight:
                total.addmm_(slopes.t(), inputs)
            else:
                total.add_(slopes.sum(0))  # Its bias.
    found.of_tokens[part] = own


class _Losses(torch.autograd.Function):
    """Computes gradients in its forward: those of the losses' sum. Its backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Output,
        places: Places,
        chunk_tokens: int,
        tokens: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = _run(output, tokens, places.targets, chunk_tokens, parameters, wants_gradients=True)
        device = tokens.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.settings = (output, places, chunk_tokens)
        ctx.save_for_backward(tokens, *parameters)
        ctx.found = found
        losses, is_right = places.spread(found.losses), places.spread(found.is_right)
        ctx.mark_non_differentiable(is_right)
        return losses, is_right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        found, ctx.found = ctx.found, None
        if found is None:
            raise RuntimeError("the gradients of chunked losses can be taken only once")
        output, places, chunk_tokens = ctx.settings
        tokens, *parameters = ctx.saved_tensors
        scale = _find_common(of_losses, places)
        if scale is None:
            device, dtype, is_enabled = ctx.autocast
            weights = of_losses.flatten()[places.numbers]
            with torch.autocast(device, dtype, enabled=is_enabled):
                found = _run(output, tokens, places.targets, chunk_tokens, parameters, True, weights)
        else:
            found.of_tokens.mul_(scale)
            for gradient in found.of_parameters:
                gradient.mul_(scale)
        gradients = [found.of_parameters.pop(0).to(each.dtype) for each in parameters]
        return None, None, None, found.of_tokens, *gradients


def _find_common(of_losses: torch.Tensor, places: Places) -> torch.Tensor | None:
    """The gradient of each loss, if it is the same for all; None if it is not.

    A sum's gradient is one number that is shown at every place: nothing has to be looked at, and no GPU waited for.
    """
    if not any(of_losses.stride()):
        return of_losses.flatten()[0]
    values = of_losses.flatten()[places.numbers]
    if not len(values):
        return of_losses.new_zeros(())
    return values[0] if bool((values == values[0]).all()) else None
