"""Prepare all that a training needs before its first step, and say what was found; nothing is trained.

    python training/check.py --config RECIPE.yaml [--key value ...]

It ends on exactly what a start would end on: a wrong label in any row, a tokenizer or weights that do not load. The
prepared data stays in the cache. `onecurve check --deep` runs this.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from onecurve.training.cache import check_folders
from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.data.preparation import prepare_data
from onecurve.training.lasting_output import protect_output
from onecurve.training.launch_protocol import EXAMPLE_LINE
from onecurve.training.models.loading import build_model, count_parameters, load_task
from onecurve.training.models.mask_trial import try_masks
from onecurve.training.outcome import Outcome, end_process, report_outcome
from onecurve.training.record.console import quiet_third_parties


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Load processor, data and model as a training does; print a line for each."""
    quiet_third_parties()
    recipe = load_recipe(*parse_arguments(arguments)).recipe
    check_folders((recipe.model_name_or_path, recipe.tokenizer_name, recipe.dataset_name))
    task, config, processor = load_task(recipe)
    data = prepare_data(recipe, task, processor)
    model = build_model(recipe, config, task, processor)
    trained, total = count_parameters(model)
    mask_note = try_masks(model, task, processor, data.train, recipe)
    for split in (data.train, data.validation, data.test):
        if split is not None:
            lengths, kind = split.lengths, "examples" if "row" in split.examples else "rows"
            print(
                f"data      {len(split)} {kind} of {split.origin}: {lengths.mean():.0f} tokens on average, "
                f"{lengths.max()} at most"
            )
    print(f"sample    {task.describe_sample(data.train.examples, processor)}")
    for line in task.describe_facts():
        print(line)
    for line in (task.describe_left_out() or "").splitlines():
        print(f"data      {line}")
    example = task.describe_example(data.train.examples, processor)
    if example is not None:
        print(f"{EXAMPLE_LINE}{json.dumps(example)}")
    for line in (*data.notes, *filter(None, (mask_note,))):
        print(f"note      {line}")
    print(f"model     {total:,} parameters, {trained:,} trained")


if __name__ == "__main__":
    protect_output()
    end_process(report_outcome(main, sys.argv[1:]))
