"""Put a run's adapter into its model, and prove that the whole model gives the same outputs.

    python training/merge.py --run runs/mine --output runs/mine/merged

`onecurve merge` runs it. The product of the adapter's matrices is added to the weights in float32. The result is a model
like any other, with tokenizer, chat template and generation config.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

import torch

from onecurve.training.config import Recipe, load_recipe, parse_arguments
from onecurve.training.data.layout import Collator
from onecurve.training.data.preparation import prepare_data
from onecurve.training.errors import BadInput, Fault
from onecurve.training.lasting_output import protect_output
from onecurve.training.models.adapters import has_adapter, merge_adapter
from onecurve.training.models.loading import load_trained
from onecurve.training.models.logits import read_logits
from onecurve.training.outcome import Outcome, end_process, report_outcome
from onecurve.training.record.console import quiet_third_parties
from onecurve.training.recovery.publishing import publish
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks import Task, build_task

_NUM_EXAMPLES = 8

# In float32, sums in another order differ by less. Logits are compared relative to their norm.
_MAX_DEVIATION = 1e-4


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Merge, compare, write.

    Raises:
        BadInput: the run has no adapter, or the output can't be written to.
        Fault: the merged model is another one.
    """
    quiet_third_parties()
    _, flags = parse_arguments(arguments)
    if flags.keys() != {"run", "output"}:
        raise BadInput(f"merge takes --run and --output, not {', '.join(sorted(flags)) or 'nothing'}")
    run, output = RunDirectory(Path(flags["run"])), Path(flags["output"])
    recipe = load_recipe(str(run.config)).recipe
    task = build_task(recipe)
    model, tokenizer = load_trained(run.final, recipe, task)
    model.eval()
    if not has_adapter(model):
        raise BadInput(f"{run.final} is a whole model, and there is no adapter to merge")
    if output.exists():
        raise BadInput(f"--output: {str(output)!r} exists; give a new folder")
    batch = _take_examples(recipe, task, tokenizer)
    if model.config.is_encoder_decoder:  # Any tokens will do for the decoder.
        batch["decoder_input_ids"] = batch["input_ids"]
    expected = _compute_logits(model, batch)
    merge_adapter(model)
    deviation = _compare(_compute_logits(model, batch), expected)
    if not deviation <= _MAX_DEVIATION:
        raise Fault(
            f"the merged model is another one: its logits deviate by {deviation:.1e} of their norm; nothing is written. Are "
            "weights tied that the adapter changes in one place only?"
        )

    def fill(staging: Path) -> None:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text((run.final / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
        again = type(model).from_pretrained(staging, dtype=torch.float32).eval()
        if not torch.equal(_compute_logits(again, batch), _compute_logits(model, batch)):
            raise Fault("the merged model gives other logits when read back")

    if problem := publish(output, fill):
        raise Fault(problem)
    outcome.print_once(
        f"{output} is the whole model: on {_NUM_EXAMPLES} examples its logits deviate by at most {deviation:.1e} of their norm"
    )


def _take_examples(recipe: Recipe, task: Task, tokenizer: Any) -> dict[str, Any]:
    """The first examples of the validation data, as the model reads them."""
    examples = prepare_data(recipe, task, tokenizer).validation.examples
    names = examples.keys() - task.unbatched_features - {"labels"}
    numbers = range(min(_NUM_EXAMPLES, len(examples["input_ids"])))
    return Collator(task, tokenizer)({name: examples[name][list(numbers)] for name in names})


def _compute_logits(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return read_logits(model(**batch))


def _compare(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation of an example's logits, relative to their norm."""
    found, expected = found.flatten(1), expected.flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


if __name__ == "__main__":
    protect_output()
    end_process(report_outcome(main, sys.argv[1:]))
