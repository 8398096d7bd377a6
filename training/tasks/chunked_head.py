"""A language model that returns the losses of its tokens instead of their logits.

While a batch is computed, the forward of the model's output layer is replaced by one that computes losses in chunks. The
model's own forward is still what is called: the hooks of DDP, FSDP2 and DeepSpeed run as always, and the output layer's
weights are gathered once a micro-batch. What a family does to logits behind that layer (a soft cap, a scale) is done in the
chunks, and switched off in the model meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from onecurve.training.process import is_main_process
from onecurve.training.tasks.chunked_losses import Compute, Output, Places, compute_losses

_NUM_TRIED_TOKENS = 8
# Largest deviation of the tried losses, relative to how far they are from those of equal logits. Unknown scales deviate by more.
_BOUND, _BOUND_OF_HALF = 1e-3, 5e-2


@dataclass(frozen=True)
class Head:
    """A model's output layer, and what the model does to its outputs.

    Attributes:
        module: gives logits [..., vocabulary] of hidden states [..., hidden size].
        vocab_size: the number of logits.
        finish: what the model does to logits before it returns them.
        neutral: objects, an attribute of each, and the value with which the model returns the layer's outputs as they are.
    """

    module: torch.nn.Module
    vocab_size: int
    finish: Compute = lambda logits: logits
    neutral: tuple[tuple[Any, str, Any], ...] = ()

    @contextmanager
    def replaced_by(self, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Let the model return what `forward` makes of hidden states."""
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in self.neutral]
        own_forward = self.module.__dict__.get("forward")
        try:
            for owner, name, value in self.neutral:
                setattr(owner, name, value)
            self.module.forward = forward
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
            del self.module.forward
            if own_forward is not None:
                self.module.forward = own_forward


def find_head(model: Any) -> Head:
    """The output layer of a model of transformers, without wrappers.

    Raises:
        NotImplementedError: it has none that can be replaced; the message says why.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise NotImplementedError("it has no output layer of its own")
    of_children = [each for child in module.children() for each in child.parameters()]
    if any(hasattr(each, "ds_id") for each in of_children):
        raise NotImplementedError("its output layer has parts, which ZeRO-3 gathers one by one")
    config = model.config.get_text_config()
    size, scale = int(config.vocab_size), getattr(model, "logit_scale", None)
    cap, divisor = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None)
    finish: Compute
    neutral: tuple[Any, str, Any]
    if cap is not None:  # Gemma
        finish, neutral = lambda logits: torch.tanh(logits / cap) * cap, (config, "final_logit_softcapping", None)
    elif divisor is not None:  # Granite
        finish, neutral = lambda logits: logits / divisor, (config, "logits_scaling", 1.0)
    elif isinstance(scale, int | float):  # Cohere
        finish, neutral = lambda logits: logits * scale, (model, "logit_scale", 1.0)
    else:
        return Head(module, size)
    return Head(module, size, finish, (neutral,))


def run_with_losses(
    model: torch.nn.Module, head: Head, inputs: Mapping[str, Any], places: Places, chunk_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call a model whose output layer gives losses.

    Args:
        model: the prepared model, with its wrappers.
        inputs: what its forward takes.

    Returns:
        What the model returns, and what its output layer gave: [rows, length - ahead] losses in float32 or wider, 0 where
        there is no target; and as many bools, whether the most likely token is the target.

    Raises:
        NotImplementedError: the model calls the layer in another way.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    own_forward = head.module.forward

    linear = head.module if type(head.module) is torch.nn.Linear else None
    output = Output(own_forward, head.finish, linear)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:-1] != (places.shape[0], places.shape[1] + places.ahead) or found:
            raise NotImplementedError("it does not call its output layer once, with the hidden states of a batch")
        # Now, because FSDP2 puts gathered weights in the place of its shards.
        parameters = [each for each in head.module.parameters() if each.requires_grad]
        found.append(compute_losses(output, parameters, hidden, places, chunk_tokens))
        return found[0][0]

    with head.replaced_by(forward):
        returned = model(**inputs, use_cache=False).logits
    return returned, *found[0]


_HEADS: WeakKeyDictionary[torch.nn.Module, Head | None] = WeakKeyDictionary()


def find_tried_head(model: Any) -> Head | None:
    """The output layer of a prepared model, if losses in chunks were seen to be those of all logits; else None.

    A model is tried once, with a few tokens: all processes call this together. Rank 0 says what failed.
    """
    bare = _unwrap(model)
    if bare not in _HEADS:
        was_training = model.training
        model.eval()
        try:
            _HEADS[bare] = _try(model, bare)
        except NotImplementedError as error:
            _HEADS[bare] = None
            if is_main_process():
                print(f"loss_chunk_tokens: all logits of a micro-batch are in memory at once: {error}", flush=True)
        model.train(was_training)
    return _HEADS[bare]


def _unwrap(model: Any) -> Any:
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _try(model: Any, bare: Any) -> Head:
    """Compare losses in chunks with those of all logits.

    Raises:
        NotImplementedError: they are not the same.
    """
    head = find_head(bare)
    device = next(bare.parameters()).device
    tokens = torch.arange(1, 2 * _NUM_TRIED_TOKENS, 2, device=device)[None] % head.vocab_size
    places = Places.find(tokens)
    logits = model(input_ids=tokens, use_cache=False).logits
    wanted = F.cross_entropy(logits.double()[0, :-1], places.targets, reduction="none")
    returned, losses, _ = run_with_losses(model, head, {"input_ids": tokens}, places, _NUM_TRIED_TOKENS // 2)
    if returned.shape != losses.shape or not torch.equal(returned.to(losses.dtype), losses):
        raise NotImplementedError("it changes logits in a way that is not known here")
    # Outputs of half precision, whatever they were converted to afterwards.
    is_half = any(torch.equal(logits, logits.to(dtype)) for dtype in (torch.bfloat16, torch.float16))
    spread = (wanted - torch.log(torch.tensor(float(logits.shape[-1])))).norm()
    deviation = float((losses[0].double() - wanted).norm() / spread)
    if not deviation <= (_BOUND_OF_HALF if is_half else _BOUND):
        raise NotImplementedError(f"losses in chunks deviate by {deviation:.1e} from those of all logits")
    return head
