"""Whether a model's dropout is by example: tried out on the real model at its start.

Two short examples go through the model together, padded, and one by one, with dropout on. Where their losses differ, something
in the model draws random numbers that don't ask for masks by example, and the user is told which part does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from onecurve.training.config import Recipe
from onecurve.training.data.layout import Collator
from onecurve.training.data.loading import draw_features
from onecurve.training.data.preparation import Split
from onecurve.training.models import example_dropout, example_masks
from onecurve.training.models.example_masks import ExampleMasks
from onecurve.training.models.failures import UnsuitableModel, explain_model_errors
from onecurve.training.tasks.base import Task

# Largest relative deviation of a loss. Other masks deviate by more.
_BOUNDS = {"no": 1e-4, "fp16": 1e-2, "bf16": 3e-2}


def try_masks(model: Any, task: Task, processor: Any, split: Split, recipe: Recipe) -> str | None:
    """What the user should know of a model's dropout; None where all of it is by example, or should not be.

    Args:
        model: on the host, not prepared, with the attention of transformers.
    """
    if recipe.dropout_masks != "by_example" or (recipe.dropout == 0 and recipe.lora_dropout == 0):
        return None
    if recipe.attn_implementation in example_dropout.KERNELS_WITH_DROPOUT:
        return _describe_kernel(model, recipe.attn_implementation)
    example_dropout.intercept()
    lengths = np.asarray(split.lengths)
    first = int(lengths.argmin())
    longer = np.where(lengths > lengths[first], lengths, np.iinfo(np.int64).max)
    pair = [first, int(longer.argmin()) if len(np.unique(lengths)) > 1 else (first + 1) % len(lengths)]
    was_training = model.training
    model.train()
    try:
        with explain_model_errors(recipe.model_name_or_path, is_first_step=True):
            with _name_drawing(model) as names:
                together = _compute(model, task, processor, split, pair, recipe)
            alone = torch.cat([_compute(model, task, processor, split, [example], recipe) for example in pair])
    except UnsuitableModel:
        return None  # The first step says why, where there is one; or the model runs on its own device only.
    finally:
        example_masks.begin(None)
        model.train(was_training)
    deviation = float(((together - alone).abs() / alone.abs().clamp(min=1e-3)).max())
    if deviation <= _BOUNDS[recipe.mixed_precision]:
        return None
    parts = f"{', '.join(names)} draws" if names else "it draws"
    return (
        f"With dropout on, this model's losses depend on the micro-batch (two short examples deviate by {deviation:.1e}): "
        f"{parts} random numbers of its own. Curves of other topologies agree statistically only."
    )


def _compute(
    model: Any, task: Task, processor: Any, split: Split, examples: Sequence[int], recipe: Recipe
) -> torch.Tensor:
    """[examples] losses, with dropout on."""
    collator = Collator(task, processor)
    features = draw_features(split, task, np.array(examples), epoch=0)
    example_masks.begin(ExampleMasks(recipe.seed, 0, examples, collator.describe_placement(features)))
    is_mixed = recipe.mixed_precision == "bf16"
    with torch.no_grad(), torch.random.fork_rng([]), torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        torch.manual_seed(recipe.seed)
        losses = task.forward(model, collator(features)).losses
    assert losses is not None, "training data has targets"
    return losses


@contextmanager
def _name_drawing(model: Any) -> Iterator[list[str]]:
    """The modules in whose forward torch's generator is drawn from, by name, the innermost ones."""
    names: list[str] = []
    paths = {module: path for path, module in model.named_modules()}
    known = [torch.get_rng_state()]

    def begin(module: torch.nn.Module, inputs: Any) -> None:
        if module is model:  # The generator has just been seeded.
            known[0] = torch.get_rng_state()

    def look(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        state = torch.get_rng_state()
        if not torch.equal(state, known[0]) and module in paths:
            names.append(f"{paths[module] or 'the model'} ({type(module).__name__})")
        known[0] = state

    hooks = (
        torch.nn.modules.module.register_module_forward_pre_hook(begin),
        torch.nn.modules.module.register_module_forward_hook(look),
    )
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _describe_kernel(model: Any, name: str) -> str | None:
    config = model.config.get_text_config()
    keys = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")
    if not any(getattr(config, key, None) for key in keys):
        return None
    return (
        f"attn_implementation: {name} draws its own dropout masks, which depend on the micro-batch. Curves of other topologies "
        "agree statistically only; without attn_implementation they are the same."
    )
