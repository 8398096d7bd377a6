"""Put a run's adapter into its model, and prove that the whole model gives the same outputs.

    python training/merge.py --run runs/mine --output runs/mine/merged

`onecurve merge` runs it. The product of the adapter's matrices is added to the weights in float32. The result is a model
like any other, with tokenizer, chat template and generation config.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.errors import BadInput
from onecurve.training.lasting_output import protect_output
from onecurve.training.outcome import Outcome, end_process, report_outcome
from onecurve.training.record.console import quiet_third_parties
from onecurve.training.recovery.merging import write_merged
from onecurve.training.run_directory import RunDirectory


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Merge, compare, write.

    Raises:
        BadInput: the run has no adapter, or the output can't be written to.
        Fault: the merged model is another one.
    """
    quiet_third_parties()
    _, flags = parse_arguments(arguments)
    if flags.keys() - {"yes"} != {"run", "output"}:
        raise BadInput(f"merge takes --run, --output and --yes, not {', '.join(sorted(flags)) or 'nothing'}")
    run, output = RunDirectory(Path(flags["run"])), Path(flags["output"])
    recipe = load_recipe(str(run.config)).recipe
    if output.exists():
        raise BadInput(f"--output: {str(output)!r} exists; give a new folder")
    if recipe.quantization != "none" and flags.get("yes") != "true":
        raise BadInput(
            f"quantization: {recipe.quantization} rounded the weights that {run.path}'s adapter was trained beside. The merged "
            "model has these rounded weights in float32: it is as large as the original, whose exact weights are lost in it. "
            "`onecurve merge RUN --yes` writes it; without a merge the adapter runs beside the quantized model"
        )
    outcome.print_once(write_merged(recipe, run.final, output))


if __name__ == "__main__":
    protect_output()
    end_process(report_outcome(main, sys.argv[1:]))
