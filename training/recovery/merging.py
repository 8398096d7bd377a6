"""The model that an adapter makes: one whole model with the same outputs, or nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onecurve.training.config import Recipe
from onecurve.training.data.layout import Collator
from onecurve.training.data.preparation import prepare_data
from onecurve.training.errors import BadInput, Fault
from onecurve.training.models.adapters import has_adapter, merge_adapter
from onecurve.training.models.loading import load_trained
from onecurve.training.models.logits import read_logits
from onecurve.training.recovery.publishing import publish
from onecurve.training.tasks import Task, build_task

_NUM_EXAMPLES = 8

# In float32, sums in another order differ by less. Logits are compared relative to their norm.
_MAX_DEVIATION = 1e-4


def write_merged(recipe: Recipe, final: Path, output: Path, examples: Any = None) -> str:
    """Put the adapter of final/ into its model, compare the logits before and after, and write the whole model.

    It holds the model in memory once more, in float32.

    Args:
        recipe: of the run.
        output: a folder; one that is there is replaced.
        examples: prepared validation examples; None prepares them.

    Returns:
        A line for the user.

    Raises:
        BadInput: the run has no adapter.
        Fault: the merged model is another one, or can't be written.
    """
    task = build_task(recipe)
    model, processor = load_trained(final, recipe, task, is_dequantized=True)
    model.eval()
    if not has_adapter(model):
        raise BadInput(f"{final} is a whole model, and there is no adapter to merge")
    if examples is None:
        examples = prepare_data(recipe, task, processor).validation.examples
    batch = _take_examples(examples, task, processor)
    if model.config.is_encoder_decoder:  # Any tokens will do for the decoder.
        batch["decoder_input_ids"] = batch["input_ids"]
    expected = _compute_logits(model, batch)
    merge_adapter(model)
    deviation = _compare(_compute_logits(model, batch), expected)
    if not deviation <= _MAX_DEVIATION:
        raise Fault(
            f"the merged model is another one: its logits deviate by {deviation:.1e} of their norm; nothing is written. Are "
            "weights tied that the adapter changes in one place only? The adapter itself is whole"
        )

    def fill(staging: Path) -> None:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / "README.md").write_text((final / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
        again = type(model).from_pretrained(staging, dtype=torch.float32).eval()
        if not torch.equal(_compute_logits(again, batch), _compute_logits(model, batch)):
            raise Fault("the merged model gives other logits when read back")

    if problem := publish(output, fill):
        raise Fault(problem)
    return f"{output} is the whole model: on {_NUM_EXAMPLES} examples its logits deviate by at most {deviation:.1e} of their norm"


def _take_examples(examples: Any, task: Task, processor: Any) -> dict[str, Any]:
    """The first examples, as the model reads them."""
    names = examples.keys() - task.unbatched_features - {"labels"}
    numbers = range(min(_NUM_EXAMPLES, len(next(iter(examples.values())))))
    return task.model_inputs(Collator(task, processor)({name: examples[name][list(numbers)] for name in names}))


def _compute_logits(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return read_logits(model(**batch))


def _compare(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation of an example's logits, relative to their norm."""
    found, expected = found.flatten(1), expected.flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
