"""Which layout a training has: tried out on the real model at its start.

Short sequences go through the model one by one with transformers' own attention, then together with ours, packed or padded.
Where the logits are not the same, the model keeps its attention, its batches stay padded, and the user is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from onecurve.training.config import Recipe
from onecurve.training.data.layout import Collator, Layout
from onecurve.training.models import attention
from onecurve.training.models.logits import read_logits
from onecurve.training.tasks.base import Task

# Two of equal length, which attention computes together, and a longer one.
_TRIED_LENGTHS = (3, 3, 6)

# Largest deviation of a sequence's logits, relative to their norm. Sequences that see each other deviate by much more.
_BOUNDS = {"no": 1e-4, "fp16": 1e-2, "bf16": 3e-2}

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Attention:
    """What `prepare_attention` did.

    Attributes:
        own: transformers' name of the attention that the model had.
        obstacle: why it still has it; None where it has ours.
        is_causal: whether the model's masks depend on the order of tokens.
    """

    own: str
    obstacle: str | None
    is_causal: bool


def prepare_attention(model: Any, recipe: Recipe) -> Attention:
    """Give a causal model the attention that needs no mask. Before the model is sharded, after `example_dropout.install`."""
    attention.prevent_reads(model)
    own, obstacle = model.config._attn_implementation, attention.find_obstacle(model)
    if recipe.attn_implementation is not None:
        obstacle = "attn_implementation is set"
    if obstacle is None:
        attention.install(model)
    return Attention(own, obstacle, attention.is_causal(model))


def choose_layout(
    accelerator: Accelerator, model: Any, prepared: Attention, task: Task, processor: Any, recipe: Recipe
) -> tuple[Layout, str | None]:
    """The layout of all batches, and what to say of it. All processes call this together, with the prepared model."""
    # A batch with a mask and one without are two programs for a compiler.
    has_mask = prepared.is_causal or recipe.torch_compile
    own = Layout(mask="always" if has_mask else "padding", pads_left=task.padding_side(processor) == "left")
    layout, obstacle = own, prepared.obstacle
    if obstacle is None:
        candidates, slowness = [Layout(mask="never")], None
        if task.packs and recipe.layout == "auto":
            bare, dtype = accelerator.unwrap_model(model), _DTYPES[accelerator.mixed_precision]
            slowness = _agree(accelerator, attention.find_slow_packing(bare, accelerator.device, dtype))
        if task.packs and recipe.layout != "padded" and slowness is None:
            candidates.insert(0, Layout(is_packed=True))
        layout, obstacle = _try(accelerator, model, task, processor, prepared, own, candidates)
        obstacle = obstacle or slowness
    if layout.is_packed or recipe.layout == "padded" or (recipe.layout == "auto" and not task.packs):
        return layout, None
    reason = f"packing is not possible or slow here ({obstacle})" if task.packs else f"task {recipe.task} does not pack"
    return layout, f"Micro-batches are padded: {reason}."


def _agree(accelerator: Accelerator, reason: str | None) -> str | None:
    """This process's reason, or that another one has some: devices may differ, and layouts must not."""
    is_given = torch.full((), float(reason is not None), device=accelerator.device)
    return reason or ("another process's device has no kernel for it" if accelerator.reduce(is_given) > 0 else None)


def _try(
    accelerator: Accelerator,
    model: Any,
    task: Task,
    processor: Any,
    prepared: Attention,
    own: Layout,
    candidates: list[Layout],
) -> tuple[Layout, str | None]:
    """The first layout that gives the right logits, and what was wrong with those before it; else the model's own."""
    trial = _Trial(accelerator, model, Collator(task, processor, own), prepared.own)
    obstacle = None
    for layout in candidates:
        deviation = trial.measure(Collator(task, processor, layout))
        if deviation <= _BOUNDS[accelerator.mixed_precision]:
            return layout, obstacle
        obstacle = obstacle or f"its logits deviate by {deviation:.1e} from those of single sequences"
    accelerator.unwrap_model(model).set_attn_implementation(prepared.own)
    return own, obstacle


class _Trial:
    """The same short sequences in several layouts."""

    def __init__(self, accelerator: Accelerator, model: Any, collator: Collator, implementation: str) -> None:
        self._accelerator, self._model = accelerator, model
        config = accelerator.unwrap_model(model).config
        numbers = np.random.default_rng(0).integers(0, config.vocab_size, sum(_TRIED_LENGTHS))
        numbers[numbers == config.pad_token_id] = (config.pad_token_id or 0) ^ 1
        self._sequences = np.split(numbers, np.cumsum(_TRIED_LENGTHS)[:-1])
        ours = config._attn_implementation
        accelerator.unwrap_model(model).set_attn_implementation(implementation)
        with torch.compiler.set_stance("force_eager"):  # No layer is compiled for an attention that it will not have.
            self._expected = [self._compute(collator, [sequence])[0] for sequence in self._sequences]
        accelerator.unwrap_model(model).set_attn_implementation(ours)

    def measure(self, collator: Collator) -> float:
        """The largest deviation of a sequence's logits on any process, relative to their norm; may be NaN."""
        found = self._compute(collator, self._sequences)
        deviations = [(mine - own).norm() / own.norm() for mine, own in zip(found, self._expected, strict=True)]
        return float(self._accelerator.gather(torch.stack(deviations)).max())

    def _compute(self, collator: Collator, sequences: list[Any]) -> list[torch.Tensor]:
        """Logits of each sequence: of its tokens, or of all of it."""
        was_training = self._model.training
        self._model.eval()
        batch = collator({"input_ids": sequences})
        batch = {
            name: each.to(self._accelerator.device) if torch.is_tensor(each) else each for name, each in batch.items()
        }
        with torch.no_grad():
            logits = read_logits(self._model(**batch, use_cache=False))
        self._model.train(was_training)
        return collator.layout.split(logits, [len(each) for each in sequences]) if logits.dim() == 3 else list(logits)
