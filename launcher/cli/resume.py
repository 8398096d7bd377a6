"""`onecurve resume RUN`: continue a run from its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from onecurve.launcher.cli.options import LaunchOptions, RunArgument, takes
from onecurve.launcher.cli.run import launch_training


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(LaunchOptions):
    """The command line of `onecurve resume`."""

    run: RunArgument


@takes(ResumeOptions)
def resume(options: ResumeOptions) -> int:
    """Continue a run from its last checkpoint.

    Also with another number of processes or another strategy: the steps stay the same.
    """
    from onecurve.launcher.facts.history import check_run
    from onecurve.launcher.facts.recipes import load_recipe

    recipe = str(check_run(options.run).config)
    overrides = {"output_dir": str(options.run)}
    if load_recipe(recipe).recipe.resume == "never":
        overrides["resume"] = "auto"
    return launch_training(recipe, overrides, options)
